"""transformers: our models behind TimmWrapper and TimmBackbone, whose files know them by their name in timm."""

import pytest
import torch

from tests.interop.conftest import SIZE
from tests.interop.requirement import needs
from vmoe_torch import moe_layers, routing, routing_stats

transformers = needs("transformers")


@pytest.fixture
def wrapped(tiny):
    model = transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(architecture="test_vmoe", num_labels=5, model_args={**SIZE, "noise_std": 0.0})
    )
    model.timm_model.load_state_dict(tiny().state_dict())
    return model.eval()


def test_timm_wrapper_classifies_as_the_model(wrapped, tiny, images, labels):
    model = tiny()
    model.load_state_dict(wrapped.timm_model.state_dict())
    out = wrapped(pixel_values=images, labels=labels)
    torch.testing.assert_close(out.logits, model(images), rtol=0, atol=0)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(model(images), labels))


def test_timm_wrapper_round_trip_through_files(wrapped, tmp_path, images):
    wrapped.save_pretrained(tmp_path)
    loaded = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(pixel_values=images).logits, wrapped(pixel_values=images).logits, rtol=0, atol=0)


def test_timm_wrapper_is_routed_from_outside(wrapped, images):
    (name,) = moe_layers(wrapped)
    with routing(wrapped, num_selected_experts=1, capacity_factor=0.5):
        cheaper = wrapped(pixel_values=images).logits
        assert routing_stats(wrapped)[name]["dropped"] > 0
    assert (cheaper - wrapped(pixel_values=images).logits).abs().max() > 0


def test_timm_backbone_gives_the_features_of_the_blocks(images):
    torch.manual_seed(0)
    config = transformers.TimmBackboneConfig(backbone="test_vmoe", out_indices=(0, 1), features_only=True)
    model = transformers.TimmBackbone(config, **SIZE).eval()
    maps = model(images).feature_maps
    assert [tuple(each.shape) for each in maps] == [(8, 16, 4, 4)] * 2
    assert len(moe_layers(model)) == 1
