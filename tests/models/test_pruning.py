"""Experts that a trained model can do without are dropped, and the model goes on wherever models go.

Over 400 lines: every way that a model is written and made again is tried with the same few models.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

import vmoe_torch
from tests.tiny import dropping, grey_images, randomized, tiny_model
from vmoe_torch.checkpoints import read_weights
from vmoe_torch.evaluate import count_flops, expert_usage
from vmoe_torch.layers import MoeMlp
from vmoe_torch.models.architecture import open_weights, shape_arguments
from vmoe_torch.models.description import model_arguments
from vmoe_torch.models.pruning import kept_experts
from vmoe_torch.parallel import export_safetensors
from vmoe_torch.planning import PlannedRun, plan

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def layers_of(model):
    return vmoe_torch.moe_layers(model)


def trained(**changes):
    return randomized(tiny_model(**{"num_experts": 8, "eval_capacity_factor": 0.7, **changes}))


def fine_tuned(model):
    """The model, its routers' rows moved by a distance of their own each, and longer in another order."""
    after = copy.deepcopy(model)
    for layer in layers_of(after).values():
        weight = layer.router.weight.data
        unit = weight / weight.norm(dim=1, keepdim=True)
        # By 1, 2, ... along the row; the far ones backwards.
        step = torch.arange(1.0, len(weight) + 1) * torch.where(torch.arange(len(weight)) > 4, -0.01, 0.01)
        weight += step.unsqueeze(1) * unit
    return after


@torch.no_grad()
def whole_numbers(**options):
    """A layer whose experts 1 and 5 have a gate of 0 for all tokens, and tokens; every logit is exact in any order."""
    layer = MoeMlp(16, 24, num_experts=8, capacity_multiple_of=1, group_size="batch", **options).eval()
    generator = torch.Generator().manual_seed(6)
    for parameter in layer.parameters():
        parameter.normal_(std=0.3, generator=generator)
    layer.router.weight.copy_(torch.randint(-3, 4, (8, 16), generator=generator) / 8)
    layer.router.weight[[1, 5]] = -20.0
    tokens = torch.randint(1, 5, (4, 25, 16), generator=generator).float()
    return torch.nn.ModuleDict({"mlp": layer}), tokens


@pytest.mark.parametrize("keep", [[1, 3, 6, 7], {"blocks.1.mlp": [0]}])
@pytest.mark.parametrize("changes", [{}, {"capacity_factor": "dropless"}, {"expert_hidden": (0.5,) * 8}])
def test_a_pruned_model_is_as_one_made_with_so_many_experts(keep, changes):
    model = trained(**changes)
    pruned = vmoe_torch.prune_experts(model, keep)
    made = timm.create_model(pruned.default_cfg["architecture"], **model_arguments(pruned)).eval()
    made.load_state_dict(pruned.state_dict())
    for own, fresh in zip(layers_of(pruned).values(), layers_of(made).values(), strict=True):
        assert own.sizes.hidden == fresh.sizes.hidden == own.router.sizes.hidden == own.expert_hidden
        assert len(own.expert_hidden) == own.num_experts
        assert own.expert_flops(10) == fresh.expert_flops(10)
    images = torch.randn(4, *IMAGES.shape[1:])
    assert count_flops(pruned, images) == count_flops(made, images)
    if not changes:
        run = PlannedRun(1, 1, 8)
        assert plan(pruned, run) == plan(made, run)
        with pytest.raises(ValueError, match="ep must divide num_experts"):
            plan(pruned, PlannedRun(8, 8, 8))
    budget = vmoe_torch.set_budget(pruned, flops=0.97, data=images, rounds=1)
    assert all(
        setting.num_selected_experts <= layers_of(pruned)[name].num_experts
        for name, setting in budget.chosen.settings.items()
    )


@pytest.mark.parametrize(("mean", "left"), [(0.8, 0.8), (1.5, 1.0)])
def test_a_mean_of_more_experts_than_are_left_falls_and_c_stays(mean, left):
    options = {"mean_selected_experts": mean, "gate_threshold": 0.1, "capacity_factor": 1.0, "capacity_multiple_of": 1}
    model = trained(**{**options, "eval_capacity_factor": 1.0})
    pruned = vmoe_torch.prune_experts(model, [0])
    for before, after in zip(layers_of(model).values(), layers_of(pruned).values(), strict=True):
        assert (after.num_selected_experts, after.mean_selected_experts) == (1, left)
        wanted = [min(before.router.capacity(tokens), tokens) for tokens in (20, 40, 100)]
        assert [after.router.capacity(tokens) for tokens in (20, 40, 100)] == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"capacity_factor": 0.6},
        {"capacity_factor": 1.05, "num_selected_experts": 1, "batch_priority": False},
        {"capacity_factor": 0.6, "renormalize_gates": True, "num_selected_experts": 3},
        {"router": "expert_choice", "capacity_factor": 1.0},
        {"capacity_factor": 0.6, "capacity_rounding": "round", "dispatch_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_dropping_what_is_never_used_changes_no_bit(options):
    model, tokens = whole_numbers(**options)
    used = torch.tensor([3, 0, 1, 5, 2, 0, 9, 1])
    pruned = vmoe_torch.prune_experts(model, 6, usage={"mlp": used})
    layer, left = model["mlp"], pruned["mlp"]
    assert torch.equal(left.router.weight, layer.router.weight[[0, 2, 3, 4, 6, 7]])
    want = layer(tokens)
    assert (layer.router(tokens).softmax(-1)[..., [1, 5]] == 0).all()
    probabilities = layer.router(tokens).softmax(-1)[..., [0, 2, 3, 4, 6, 7]]
    if "router" in options and not torch.equal(left.router(tokens).softmax(-1), probabilities):
        # PyTorch's softmax adds up a row in vectors: on AVX2 eight numbers otherwise than the six that are not 0.
        torch.testing.assert_close(left(tokens), want, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(left(tokens), want)
    assert want.abs().max() > 0.1
    assert options.get("router") or (layer.record.slots < 0).any()
    # Of every number of tokens, and the ones that go are the ones that are not used.
    assert [left.capacity(size) for size in range(8, 500)] == [layer.capacity(size) for size in range(8, 500)]
    others = vmoe_torch.prune_experts(model, [0, 1, 2, 3, 4, 5])["mlp"]
    assert not torch.allclose(others(tokens), want)


def test_unused_experts_of_a_model_change_it_by_rounding_at_most():
    model = trained()
    for layer in layers_of(model).values():
        layer.router.weight.data[3] = -1e4 * layer.router.weight.data[0].abs()
    # Behind a norm with a large bias, tokens are all positive: the gate of expert 3 is 0.
    for block in model.blocks:
        block.norm2.weight.data.fill_(0.5)
        block.norm2.bias.data.fill_(3.0)
    want = model(IMAGES)
    usage = expert_usage(model, [IMAGES])
    assert all(each.choices[3] == 0 for each in usage.values())
    pruned = vmoe_torch.prune_experts(model, [0, 1, 2, 4, 5, 6, 7])
    torch.testing.assert_close(pruned(IMAGES), want, rtol=1e-4, atol=1e-5)


def test_renormalised_gates_need_no_gate_of_zero():
    """It is enough that no token has them among its choices: with all slots there are."""
    layer = MoeMlp(16, num_experts=8, num_selected_experts=2, renormalize_gates=True, capacity_factor=8.0).eval()
    tokens = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    want = layer(tokens)
    chosen = sorted(set(layer.record.experts.flatten().tolist()))
    assert len(chosen) < 8
    pruned = vmoe_torch.prune_experts(torch.nn.ModuleList([layer]), chosen)[0]
    torch.testing.assert_close(pruned(tokens), want, rtol=1e-5, atol=1e-6)


def test_a_pruned_layer_is_the_formula():
    """In NumPy and float64, nothing dropped: softmax over the experts that are left, times their MLPs."""
    layer = MoeMlp(8, 12, num_experts=6, num_selected_experts=2, act_layer="relu", capacity_factor=6.0).double().eval()
    left = vmoe_torch.prune_experts(torch.nn.ModuleList([layer]), [4, 1, 5])[0]
    tokens = np.random.default_rng(0).normal(size=(7, 8))
    router, w1, b1, w2, b2 = (
        parameter.detach().numpy()[[1, 4, 5]]
        for parameter in (layer.router.weight, layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
    )
    gates = np.exp(tokens @ router.T)
    gates /= gates.sum(1, keepdims=True)
    want = np.zeros((7, 8))
    for t, token in enumerate(tokens):
        for e in np.argsort(-gates[t])[:2]:
            want[t] += gates[t, e] * (w2[e] @ np.maximum(w1[e] @ token + b1[e], 0) + b2[e])
    got = left(torch.from_numpy(tokens)[None])[0].detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize(("criterion", "kept"), [("movement", (5, 6, 7)), ("norm", (2, 3, 4))])
@pytest.mark.parametrize("form", ["model", "state dict", "file"])
def test_those_whose_rows_moved_least_go(tmp_path, criterion, kept, form):
    before = trained()
    model = fine_tuned(before)
    source = {"model": before, "state dict": before.state_dict(), "file": str(tmp_path / "x.safetensors")}[form]
    export_safetensors(before, tmp_path / "x.safetensors")
    pruned = vmoe_torch.prune_experts(model, 3, before=source, criterion=criterion)
    for name, layer in layers_of(model).items():
        index, left = list(kept), layers_of(pruned)[name]
        assert left.num_experts == left.own_router().num_experts == 3
        for key, value in layer.named_parameters():
            assert torch.equal(left.get_parameter(key), value[index]), key
    assert layer.num_experts == 8
    assert not pruned.training


def test_equal_experts_stay_in_order_and_parameters_keep_what_they_are():
    model = trained()
    model.get_parameter("blocks.1.mlp.fc1.weight").requires_grad_(False)
    pruned = vmoe_torch.prune_experts(model.train(), 0.55, before=model)
    assert kept_experts(model, 0.55, before=model) == dict.fromkeys(layers_of(model), (0, 1, 2, 3, 4))
    assert pruned.training
    assert not pruned.get_parameter("blocks.1.mlp.fc1.weight").requires_grad
    pruned(IMAGES).sum().backward()
    assert pruned.get_parameter("blocks.3.mlp.router.weight").grad.shape == (5, 16)
    # A share is rounded up, but not for a rounding error.
    assert len(kept_experts(trained(num_experts=10), 0.7, before=trained(num_experts=10))["blocks.1.mlp"]) == 7


def test_capacity():
    model = trained(num_selected_experts=2)
    first, last = layers_of(model).values()
    pruned = vmoe_torch.prune_experts(model, {"blocks.1.mlp": [3], "blocks.3.mlp": [0, 1, 2, 5]})
    one, four = layers_of(pruned).values()
    # K falls with the experts; C does not grow.
    assert (one.num_selected_experts, four.num_selected_experts) == (1, 2)
    for now, before in ((one, first), (four, last)):
        for _ in range(2):
            assert [now.capacity(size) for size in range(8, 400)] == [before.capacity(size) for size in range(8, 400)]
            now.train()
            before.train()
    grown = layers_of(vmoe_torch.prune_experts(model.eval(), [0, 1, 2, 5], keep_capacity=False))["blocks.3.mlp"]
    assert grown.eval_capacity_factor == 0.7
    assert grown.capacity(160) == 2 * last.capacity(160)
    assert not grown.chosen_routing()


def reopened(model, way, folder):
    if way == "state dict":
        torch.save(model.state_dict(), folder / "x.pt")
        return open_weights(read_weights(folder / "x.pt"))[0]
    if way == "safetensors":
        export_safetensors(model, folder / "x.safetensors")
        return open_weights(read_weights(folder / "x.safetensors"))[0]
    if way == "timm's own":
        timm.models.save_for_hf(model, folder / "hub")
    else:
        vmoe_torch.save_for_hf(model, folder / "hub", safe_serialization=True)
        assert load_file(folder / "hub" / "model.safetensors").keys() == model.state_dict().keys()
    return timm.create_model(f"local-dir:{folder / 'hub'}", pretrained=True)


@pytest.mark.parametrize("way", ["state dict", "safetensors", "timm's own", "save_for_hf"])
@pytest.mark.parametrize("keep", [{"blocks.1.mlp": [6], "blocks.3.mlp": [0, 2, 7]}, [1, 4]], ids=["uneven", "even"])
def test_a_pruned_model_is_made_again(tmp_path, way, keep):
    pruned = vmoe_torch.prune_experts(trained(), keep)
    other = reopened(pruned, way, tmp_path).eval()
    assert [layer.routing() for layer in layers_of(other).values()] == [
        layer.routing() for layer in layers_of(pruned).values()
    ]
    assert torch.equal(other(IMAGES), pruned(IMAGES))
    # And pruned once more.
    again = vmoe_torch.prune_experts(other, {"blocks.3.mlp": [0]})
    third = reopened(again, way, tmp_path).eval()
    assert torch.equal(third(IMAGES), again(IMAGES))


@pytest.mark.parametrize("way", ["state dict", "timm's own", "save_for_hf"])
@pytest.mark.parametrize("keep", [{"blocks.1.mlp": [6]}, {"blocks.3.mlp": [6]}], ids=["first", "last"])
@pytest.mark.parametrize("when", ["made", "set"])
def test_so_is_one_with_a_mean(tmp_path, way, keep, when):
    mean = {"mean_selected_experts": 1.5, "gate_threshold": 0.1}
    model = trained(**(mean if when == "made" else {}))
    if when == "set":
        vmoe_torch.set_routing(model, **mean)
    pruned = vmoe_torch.prune_experts(model, keep)
    other = reopened(pruned, way, tmp_path).eval()
    assert sorted(layer.mean_selected_experts for layer in layers_of(other).values()) == [1.0, 1.5]
    assert torch.equal(other(IMAGES), pruned(IMAGES))


def test_numbers_of_each_layer_are_checked_against_its_own():
    """One value for all, or one for each layer, of K, the mean and the threshold, in any mixture."""
    names = ("blocks.1.mlp", "blocks.3.mlp")
    one = {"num_selected_experts": 2, "mean_selected_experts": 1.0, "gate_threshold": 0.1}
    each = {"num_selected_experts": (2, 1), "mean_selected_experts": (2.0, 0.5), "gate_threshold": (0.1, 0.0)}
    for chosen in itertools.product((False, True), repeat=3):
        given = {name: each[name] if apart else (one[name],) * 2 for name, apart in zip(one, chosen)}
        as_dicts = {name: dict(zip(names, given[name])) if apart else one[name] for name, apart in zip(one, chosen)}
        model = tiny_model(num_experts=dict(zip(names, (3, 2))), **as_dicts)
        for place, layer in enumerate(layers_of(model).values()):
            assert {name: layer.routing()[name] for name in one} == {name: given[name][place] for name in one}
    with pytest.raises(ValueError, match=r"mean_selected_experts must be above 0 and at most num_selected_experts=1"):
        tiny_model(num_selected_experts=dict(zip(names, (1, 2))), mean_selected_experts=1.5, gate_threshold=0.1)


def test_shapes_alone_tell_uneven_layers():
    pruned = vmoe_torch.prune_experts(
        randomized(timm.create_model("test_vmoe", num_classes=5)), {"blocks.3.mlp": [0, 3]}
    )
    state = pruned.state_dict()
    assert state["blocks.1.mlp.router.weight"].shape[0] == 4
    assert shape_arguments("test_vmoe", state)["num_experts"] == {
        "blocks.1.mlp": 4,
        "blocks.3.mlp": 2,
        "blocks.5.mlp": 4,
    }


def test_experts_of_each_layer_in_create_model():
    numbers = {"blocks.1.mlp": 1, "blocks.3.mlp": 3}
    model = tiny_model(num_experts=numbers, num_selected_experts={"blocks.3.mlp": 2, "blocks.1.mlp": 1})
    assert {name: layer.num_experts for name, layer in layers_of(model).items()} == numbers
    assert [layer.num_selected_experts for layer in layers_of(model).values()] == [1, 2]
    with pytest.raises(
        ValueError, match=r"num_experts must be one value, or .* blocks\.1\.mlp, .*, got blocks\.0\.mlp"
    ):
        tiny_model(num_experts={"blocks.0.mlp": 2})


def test_a_moving_average_is_pruned_alike():
    model = trained()
    average = ModelEmaV3(model, decay=0.5)
    after = fine_tuned(model)
    average.update(after)
    kept = kept_experts(after, 3, before=model)
    pruned, of_average = vmoe_torch.prune_experts(after, kept), vmoe_torch.prune_experts(average.module, kept)
    assert of_average.state_dict().keys() == pruned.state_dict().keys()
    of_average.load_state_dict(pruned.state_dict())
    assert torch.equal(of_average(IMAGES), pruned(IMAGES))
    # A wrapper keeps its layers' names, and the model in it knows what it has become.
    wrapped = torch.nn.ModuleDict({"module": after})
    inner = vmoe_torch.prune_experts(wrapped, {"module.blocks.1.mlp": [0, 1]})["module"]
    assert inner.made_with["num_experts"] == {"blocks.1.mlp": 2, "blocks.3.mlp": 8}


def test_upcycled_models_too():
    dense = timm.create_model("test_vit", num_classes=4).eval()
    sparse = vmoe_torch.upcycle(dense, num_experts=4, renormalize_gates=True, capacity_factor=4.0).eval()
    pruned = vmoe_torch.prune_experts(sparse, [1, 2])
    images = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(pruned(images), dense(images), rtol=1e-4, atol=1e-4)


class _Elsewhere:
    """Images on another device than the model's."""

    def __init__(self, images):
        self.images = images

    def to(self, device):
        assert device == torch.device("cpu")
        return self.images


def test_usage_counts_what_was_processed():
    model = dropping(num_selected_experts=2, group_size="image")
    images = grey_images()
    usage = expert_usage(model.train(), [images[:2], images[2:]])
    assert model.training
    whole = expert_usage(model, [_Elsewhere(images)])
    model.eval()(images)
    for name, layer in layers_of(model).items():
        record = layer.record
        kept = (record.slots >= 0).numpy()
        counts = np.bincount(record.experts.numpy()[kept], minlength=4)
        gates = np.bincount(record.experts.numpy()[kept], record.gates.detach().numpy()[kept].astype(float), 4)
        for found in (usage[name], whole[name]):
            assert found.choices.tolist() == counts.tolist()
            # A CPU may round the products of two images otherwise than those of all.
            np.testing.assert_allclose(found.gates, gates, rtol=1e-6)
            assert found.tokens == len(kept)
        assert 0 < counts.sum() < kept.size


@pytest.mark.parametrize(
    ("keep", "options", "text"),
    [
        (9, {}, r"keep must be in 1\.\.8 in blocks\.1\.mlp, got 9"),
        (0, {}, r"keep must be in 1\.\.8 in blocks\.1\.mlp, got 0"),
        (1.5, {}, r"keep must be a share above 0 and up to 1\.0, got 1\.5"),
        (math.nan, {}, "keep must be a share above 0"),
        (True, {}, "keep must be a number, a share or numbers of experts, got True"),
        ("3", {}, "keep must be a number, a share or numbers of experts, got '3'"),
        ([], {}, "keep must number at least one expert"),
        ([1, 1], {}, r"each once, got \[1, 1\]"),
        ([8], {}, r"keep must be numbers of experts in 0\.\.7 in blocks\.1\.mlp, got 8"),
        ({"blocks.2.mlp": 3}, {}, r"keep must name layers among blocks\.1\.mlp, blocks\.3\.mlp, got blocks\.2\.mlp"),
        (3, {}, r"before or usage must be given to choose 3 of 8 experts in blocks\.1\.mlp"),
        (3, {"before": {}, "usage": {}}, "before and usage must not both be given"),
        (3, {"before": {}}, r"before must have a router \(8, 16\) for blocks\.1\.mlp, got none"),
        (3, {"before": {"blocks.1.mlp.router.weight": torch.zeros(4, 16)}}, r"got \(4, 16\)"),
        (3, {"before": {"blocks.1.mlp.router.weight": torch.full((8, 16), math.nan)}}, "routers must be finite"),
        (3, {"usage": {}}, r"usage must have every layer that it is needed for, got none for blocks\.1\.mlp"),
        (3, {"usage": {"blocks.1.mlp": torch.ones(4)}}, "usage must be 8 finite numbers of at least 0"),
        (3, {"usage": {"blocks.1.mlp": [-1.0] * 8}}, "usage must be 8 finite numbers of at least 0"),
        (8, {"criterion": "change"}, r"criterion must be one of \('movement', 'norm'\), got 'change'"),
        (8, {"keep_capacity": 1}, "keep_capacity must be"),
    ],
)
def test_what_is_wrong_is_named(keep, options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        vmoe_torch.prune_experts(trained(), keep, **options)


def test_what_is_not_known_is_refused():
    def refused(model, text):
        with pytest.raises(ValueError, match=text):
            vmoe_torch.prune_experts(model, [0])

    refused(timm.create_model("test_vit"), "model must have at least one MoE layer")
    refused(timm.create_model("eee_s32_last2_e8", device="meta"), "model must not be an ensemble")

    class Own(vmoe_torch.layers.TopExperts):
        pass

    model = trained()
    model.blocks[1].mlp.router.__class__ = Own
    refused(model, r"router must be 'top_experts' or 'expert_choice' .* \(Own\) in blocks\.1\.mlp")
    model = trained()
    model.blocks[1].mlp.router.register_buffer("threshold", torch.zeros(()))
    refused(model, r"experts must be of one size, .*, got router\.threshold in blocks\.1\.mlp")
    model = trained()
    model.blocks[3].mlp.exchange = object()
    refused(model, r"got blocks\.3\.mlp spread over ranks: do it before parallelize")
