"""A layer's and a model's numbers: strict, whatever way they come; losses in float32; renormalised gates need K > 1."""

import math

import numpy as np
import pytest
import timm
import torch

import vmoe_torch
from vmoe_torch.layers import MoeMlp, importance_loss, load_loss
from vmoe_torch.layers.losses import gshard_loss
from vmoe_torch.models.ensemble import average_members

INTEGERS = ("num_experts", "num_selected_experts", "capacity_multiple_of", "group_size")
NUMBERS = (
    "capacity_factor",
    "eval_capacity_factor",
    "noise_std",
    "drop",
    "expert_drop",
    "importance_loss_weight",
    "load_loss_weight",
    "gshard_loss_weight",
    "router_z_loss_weight",
)
ROUTING = ("num_selected_experts", "group_size", "capacity_factor", "eval_capacity_factor", "batch_priority")
BAD = [
    *((name, value) for name in INTEGERS for value in (2.0, True, -4, "2", np.float32(2))),
    *((name, value) for name in NUMBERS for value in (math.nan, math.inf, -1.0, True, "0.5", torch.tensor(0.5))),
    *((name, value) for name in ("batch_priority", "renormalize_gates") for value in (1, 0, "no", 1.0)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_layer_refuses(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        MoeMlp(8, num_experts=value if name == "num_experts" else 4, **({name: value} if name != "num_experts" else {}))


@pytest.mark.parametrize(("name", "value"), [each for each in BAD if each[0] in ROUTING])
def test_set_routing_refuses_and_changes_nothing(name, value):
    model = timm.create_model("test_vmoe", img_size=32, depth=2)
    (layer,) = vmoe_torch.moe_layers(model).values()
    before = {each: getattr(layer, each) for each in ROUTING}
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        vmoe_torch.set_routing(model, **{name: value})
    assert before == {each: getattr(layer, each) for each in ROUTING}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("head_bias_init", (math.nan, math.inf, "0", True)),
        ("representation_size", (-5, 8.0, "8")),
        ("moe_layers", (True, (1, 1.0), (-1,), 7, (np.float64(1),))),
    ],
)
def test_model_refuses(name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            timm.create_model("test_vmoe", img_size=32, depth=2, **{name: value})


def test_ensemble_refuses():
    for value in (2.0, True, 0):
        with pytest.raises(ValueError, match=r"^ensemble_size must be at least 1, got "):
            timm.create_model(
                "eee_s32_last2_e8", img_size=32, depth=2, embed_dim=16, ensemble_size=value, moe_layers=(1,)
            )


def test_numpy_numbers_become_pythons():
    layer = MoeMlp(
        8,
        num_experts=np.int64(4),
        num_selected_experts=np.int32(2),
        capacity_factor=np.float64(1.5),
        drop=np.float32(0.25),
        batch_priority=np.True_,
        group_size=np.int64(2),
    )
    settings = ("num_experts", "num_selected_experts", "capacity_factor", "expert_drop", "batch_priority", "group_size")
    assert [type(getattr(layer, name)) for name in settings] == [int, int, float, float, bool, int]
    blocks = vmoe_torch.VMoE(img_size=32, embed_dim=16, num_heads=2, depth=2, moe_layers=np.array([1]), num_experts=2)
    assert list(vmoe_torch.moe_layers(blocks)) == ["blocks.1.mlp"]


def test_one_renormalised_expert_is_evaluated_but_not_trained():
    model = timm.create_model("test_vmoe", img_size=32, depth=2, renormalize_gates=True)
    x = torch.randn(2, 3, 32, 32)
    model.train()(x).sum().backward()
    message = r"^num_selected_experts must be at least 2 in training with renormalize_gates, got 1"
    with vmoe_torch.routing(model, num_selected_experts=1):
        with pytest.raises(ValueError, match=message):
            model(x)
        assert model.eval()(x).isfinite().all()
        # Nothing to learn, nothing to refuse.
        vmoe_torch.moe_layers(model)["blocks.1.mlp"].router.weight.requires_grad_(False)
        with torch.no_grad():
            model.train()(x)
    with pytest.raises(ValueError, match=message):
        MoeMlp(8, num_experts=4, num_selected_experts=1, renormalize_gates=True)(torch.randn(2, 3, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_computed_in_float32(dtype):
    # 70,000 tokens of one expert: more than float16 can count.
    logits = torch.zeros(70_000, 4, dtype=dtype)
    logits[:, 0] = 20.0
    noisy = logits + 0.5
    for loss in (
        importance_loss(logits),
        load_loss(logits, noisy, 0.25, 2),
        gshard_loss(logits.softmax(-1)),
    ):
        assert loss.dtype == torch.float32
    for loss, want in (
        (importance_loss(logits), importance_loss(logits.double())),
        (load_loss(logits, noisy, 0.25, 2), load_loss(logits.double(), noisy.double(), 0.25, 2)),
        (gshard_loss(logits.softmax(-1)), gshard_loss(logits.softmax(-1).double())),
    ):
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_average_of_members_rounds_once(dtype):
    logits = (torch.randn(64, 1000) * 4).to(dtype)
    for log in (False, True):
        got, want = (average_members(each, 2, log) for each in (logits, logits.double()))
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype)) or (got.double() - want).abs().max() <= 0.51 * (
            torch.finfo(dtype).eps * want.abs().max()
        )
