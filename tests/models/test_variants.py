"""Every registered model with every router: its own routing gives way where it would mean something else."""

import pytest
import timm

import vmoe_torch
from vmoe_torch.layers import ROUTERS
from vmoe_torch.models.architecture import MODULES
from vmoe_torch.models.variants import merged

NAMES = [name for module in MODULES for name in timm.list_models(module=module)]
SMALL = {"embed_dim": 64, "num_heads": 2, "num_experts": 8, "num_classes": 2, "device": "meta"}


def layer_of(name, **changes):
    model = timm.create_model(name, **SMALL, **changes)
    return next(iter(vmoe_torch.moe_layers(model).values()), None)


@pytest.mark.parametrize("name", NAMES)
def test_any_model_takes_any_router(name):
    for router in ROUTERS:
        layer = layer_of(name, router=router)
        assert layer is None or layer.router_type == router
    layer_of(name, router="soft", slots_per_expert=2)
    layer_of(name, router="threshold", mean_selected_experts=0.8)
    layer = layer_of(name, router="top_experts", capacity_factor="dropless")
    assert layer is None or {layer.capacity_factor, layer.eval_capacity_factor} == {"dropless"}


def test_routing_of_the_same_kind_stays():
    layer = layer_of("vmoe_s32_last2_e8", router="threshold")
    assert (layer.eval_capacity_factor, layer.batch_priority) == (4.0, False)
    assert layer_of("test_vmoe2", router="threshold").num_selected_experts == 1
    assert layer_of("test_soft_moe", router="soft").own_router().slots_per_expert == 1
    assert layer_of("vmoe_s32_last2_e8", capacity_factor=1.5).eval_capacity_factor == 4.0


def test_routing_of_another_kind_goes():
    plain = layer_of("test_vmoe", router="expert_choice").routing()
    assert layer_of("vmoe_s32_last2_e8", router="expert_choice").routing() == plain
    assert layer_of("test_soft_moe", router="top_experts").routing() == layer_of("test_vmoe").routing()
    assert layer_of("test_expert_choice", router="top_experts").capacity(100) == layer_of("test_vmoe").capacity(100)


def test_what_the_caller_says_counts():
    with pytest.raises(ValueError, match=r"^num_selected_experts must be left out with router='soft', got 1"):
        layer_of("test_vmoe2", router="soft", num_selected_experts=1)
    assert merged({"num_selected_experts": 1, "depth": 2}, {"router": "soft", "depth": 3}) == {
        "router": "soft",
        "depth": 3,
    }
    assert layer_of("vmoe_s32_last2_e8", capacity_factor="dropless", eval_capacity_factor=2.0).eval_capacity_factor == 2
    with pytest.raises(ValueError, match=r"^router must be one of"):
        layer_of("test_vmoe2", router="no")
