"""The paper's numbers: parameters to the last digit given, FLOPs to half a point (facts of arXiv 2106.05974)."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vmoe_torch
from vmoe_torch.models import parse_moe_layers

PATCH_HEAD = {"num_classes": 18291, "representation_size": True}
# name, arguments, millions of parameters, FLOPs in percent of ViT-H/14 at K=2 and C=1.05
TABLE = [
    ("vmoe_dense_s32", {}, "36.5", 0.8),
    ("vmoe_s32", {}, "296.9", 1.0),
    ("vmoe_b32", {"moe_layers": ()}, "102.1", 2.6),
    ("vmoe_b32", {}, "980.6", 3.5),
    ("vmoe_b16", {"moe_layers": ()}, "100.5", 10.4),
    ("vmoe_b16", {}, "979.0", 14.1),
    ("vmoe_l32", {"moe_layers": ()}, "325.3", 9.1),
    ("vmoe_l32_last2", {}, "845.8", 9.7),
    ("vmoe_l16", {"moe_layers": ()}, "323.1", 36.7),
    ("vmoe_l16_last2", {}, "843.6", 38.9),
    ("vmoe_l16", {}, "3446.0", 49.8),
    ("vmoe_h14", {"moe_layers": ()}, "655.8", 100.0),
    ("vmoe_h14_last5", {}, "2688.6", 111.1),
    ("vmoe_h14", {}, "7160.8", 135.5),
    ("vmoe_15b", {"num_classes": 29593, "representation_size": 0}, "14705.1", None),
]


def _create(name, kwargs):
    # FLOPs in the paper count the capacity before it is rounded to a multiple of 4.
    return timm.create_model(name, device="meta", **{**PATCH_HEAD, "capacity_multiple_of": 1, **kwargs})


def _flops(model) -> float:
    """FLOPs of 8 images, one group."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(8, 3, 224, 224, device="meta"))
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def vit_h14():
    return _flops(_create("vmoe_h14", {"moe_layers": ()}))


@pytest.mark.parametrize(("name", "kwargs", "millions", "percent"), TABLE)
def test_parameters_and_flops_equal_the_paper(name, kwargs, millions, percent, vit_h14):
    model = _create(name, kwargs)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions
    if percent is not None:
        assert abs(100 * _flops(model) / vit_h14 - percent) <= 0.5


@pytest.mark.parametrize(
    ("routing", "percent"),
    [
        ({"num_selected_experts": 1}, 100.26),
        ({"capacity_factor": 0.5}, 100.02),
        ({"capacity_factor": 0.6}, 102.30),
    ],
)
def test_slimmer_inference_costs_what_the_paper_says(routing, percent, vit_h14):
    model = _create("vmoe_h14_last5", {})
    with vmoe_torch.routing(model, **routing):
        assert abs(100 * _flops(model) / vit_h14 - percent) <= 0.5


def test_backward_costs_twice_the_forward_in_the_experts():
    model = timm.create_model("test_vmoe", num_classes=0)
    x = torch.randn(8, 3, 160, 160)
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    forward, backward = (c.get_flop_counts()["Global"] for c in (forward, backward))
    assert backward[torch.ops.vmoe.moe_mlp_backward] == 2 * forward[torch.ops.vmoe.moe_mlp]
    assert backward[torch.ops.vmoe.router_backward] == 2 * forward[torch.ops.vmoe.router]


def test_released_shapes_are_what_was_released():
    model = timm.create_model("vmoe_s32_last2_e8", device="meta")
    layers = vmoe_torch.moe_layers(model)
    assert list(layers) == ["blocks.5.mlp", "blocks.7.mlp"]
    for layer in layers.values():
        assert (layer.num_experts, layer.num_selected_experts, layer.batch_priority) == (8, 2, False)
        assert (layer.capacity_factor, layer.eval_capacity_factor) == (1.05, 4.0)
        assert layer.dispatch_dtype == torch.bfloat16
    assert model.head_hidden_size == 512
    layers = vmoe_torch.moe_layers(timm.create_model("vmoe_b16_e8", device="meta"))
    assert list(layers) == [f"blocks.{i}.mlp" for i in (1, 3, 5, 7, 9, 11)]


@pytest.mark.parametrize(
    ("spec", "depth", "blocks"),
    [
        ("every2", 8, (1, 3, 5, 7)),
        ("every3", 8, (2, 5)),
        ("every1", 2, (0, 1)),
        ("last2", 8, (5, 7)),
        ("last5", 32, (23, 25, 27, 29, 31)),
        ((3, 1), 4, (1, 3)),
        ([0], 4, (0,)),
        (2, 4, (2,)),
        ((), 4, ()),
    ],
)
def test_moe_layers_are_parsed(spec, depth, blocks):
    assert parse_moe_layers(spec, depth) == blocks


@pytest.mark.parametrize("spec", ["every0", "every", "last5", "odd", "2", (4,), (-1,), 9])
def test_wrong_moe_layers_are_named(spec):
    with pytest.raises(ValueError, match="moe_layers must be"):
        parse_moe_layers(spec, 4)
