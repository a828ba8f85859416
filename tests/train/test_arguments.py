"""Arguments of a model by its own signature: types, ranges, near misses; a fault of ours stays one."""

import pytest
import timm

from vmoe_torch.train import Config, build_model, build_transforms
from vmoe_torch.train.build import image_mode


def built(*assignments, name="test_vmoe"):
    return build_model(Config().override(f"model.name={name}", *assignments).model, 10)


@pytest.mark.parametrize(
    ("text", "value"), [("no", False), ("off", False), ("False", False), ("false", False), ("yes", True), ("On", True)]
)
def test_words_are_truth_values_where_the_signature_wants_them(text, value):
    assert built(f"model.kwargs.batch_priority={text}").blocks[5].mlp.batch_priority is value
    dense = "vit_tiny_patch16_224"
    upcycled = built("model.upcycle.num_experts=2", f"model.upcycle.batch_priority={text}", name=dense)
    assert upcycled.blocks[1].mlp.batch_priority is value
    assert Config().override(f"run.compile={text}").run.compile is value


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batch_priority=maybe", "batch_priority must be bool, got 'maybe'"),
        ("batch_priority=1", "batch_priority must be bool, got 1"),
        (
            "capacity_facto=1",
            "capacity_facto is an unexpected keyword argument 'capacity_facto'; did you mean capacity_factor",
        ),
        ("num_experts=many", "num_experts must be int, got 'many'"),
        ("depth=2.5", "depth must be int, got 2.5"),
        ("depth=true", "depth must be int, got True"),
        ("patch_size=0", "patch_size must be at least 1, got 0"),
        ("img_size=[64,0]", "img_size must be at least 1, got 0"),
        ("drop_path_rate=2", r"drop_path_rate must be in \[0, 1\), got 2.0"),
        ("drop_rate=nan", r"drop_rate must be in \[0, 1\), got nan"),
        ("in_chans=4", "in_chans must be one of 1, 3, got 4"),
        ("global_pool=", "global_pool must be text that is not empty, got ''"),
        ("act_layer=foo", "act_layer='foo' of test_vmoe: KeyError 'foo'"),
        ("num_heads=5", "num_heads=5 of test_vmoe: "),
    ],
)
def test_argument_that_does_not_fit_is_named(argument, message):
    with pytest.raises(ValueError, match=rf"^(model\.kwargs of test_vmoe: )?model\.kwargs\.{message}"):
        built(f"model.kwargs.{argument}")


def test_arguments_of_other_models_are_known_too():
    assert built("model.kwargs.zero_init_last=no", name="resnet18").num_classes == 10
    with pytest.raises(ValueError, match=r"model\.kwargs of resnet18: model\.kwargs\.num_experts is an unexpected"):
        built("model.kwargs.num_experts=4", name="resnet18")
    with pytest.raises(
        ValueError, match=r"model\.upcycle\.num_expert is an unexpected keyword .*; did you mean num_experts"
    ):
        built("model.upcycle.num_expert=4", name="vit_tiny_patch16_224")


def test_whole_numbers_may_be_written_as_fractions():
    assert built("model.kwargs.num_experts=4.0").blocks[5].mlp.num_experts == 4
    assert built("model.kwargs.capacity_factor=1.").blocks[5].mlp.capacity_factor == 1.0


def test_images_have_one_or_three_channels():
    with pytest.raises(ValueError, match=r"model\.kwargs\.in_chans must be one of 1, 3, got 4"):
        image_mode(Config().override("model.kwargs.in_chans=4").model)


def test_fault_in_a_model_nobody_set_is_not_taken_for_the_users(monkeypatch):
    def fails(*args, **kwargs):
        raise TypeError("ours")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(TypeError, match="ours"):
        built()


@pytest.mark.parametrize("policy", ["foo", "rand-q9"])
def test_policy_that_timm_cannot_read_is_named(policy):
    with pytest.raises(ValueError, match=rf"^data\.auto_augment must be a policy of timm's, .* got '{policy}'"):
        build_transforms(Config().override(f"data.auto_augment={policy}").data, built())


def test_mean_has_a_value_per_channel():
    for name in ("mean", "std"):
        with pytest.raises(ValueError, match=rf"data\.{name} must have 1 or 3 values, one per channel, got 2"):
            build_transforms(Config().override(f"data.{name}=0.5,0.5").data, built())
