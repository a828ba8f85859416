"""Routers as modules: one from outside works everywhere, a wrapped one too; what a forward launches."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_torch
from vmoe_torch.analyze import random_routers
from vmoe_torch.layers import ROUTERS, MoeMlp, Routed, Router, importance_loss, steps
from vmoe_torch.layers.scores import logits

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


class ByPlace(Router):
    """A token's place in its group says its expert."""

    def route(self, tokens, weight, groups, seed):
        scores = logits(tokens, weight)
        place = torch.arange(groups.tokens, device=tokens.device) % groups.size
        experts = (place % self.num_experts).unsqueeze(1)
        gates, experts = scores.softmax(-1).gather(1, experts), experts.to(torch.int32)
        order = (self.batch_priority, self.priority, self.implementation())
        slots = steps.assign_slots(experts, gates, self.num_experts, groups, *order)
        record = {"experts": experts}
        if self.training:
            record["loss"] = self.importance_loss_weight * importance_loss(scores)
        return Routed(gates, slots, record)


@pytest.fixture
def by_place(monkeypatch):
    """What a file of one's own would do: one line."""
    monkeypatch.setitem(ROUTERS, "by_place", ByPlace)


def _model(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    settings = {"router": "by_place", "num_experts": 4, "capacity_factor": 2.0, "group_size": 2}
    model = vmoe_torch.VMoE(**{**TINY, **settings, **kwargs})
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.usefixtures("by_place")
def test_a_router_from_outside_trains_and_travels():
    model, images, labels = _model(), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    (layer,) = vmoe_torch.moe_layers(model).values()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert vmoe_torch.auxiliary_loss(model) > 0
    assert vmoe_torch.routing_stats(model)["blocks.1.mlp"]["dropped"] == 0
    vmoe_torch.set_routing(model, eval_capacity_factor=0.25, batch_priority=False)
    with torch.no_grad():
        want = model.eval()(images)
    assert vmoe_torch.routing_stats(model)["blocks.1.mlp"]["dropped"] > 0.5
    assert layer.record.groups.rows == 2 * layer.capacity(34)
    other = _model()
    other.load_state_dict(model.state_dict())
    for twin in (other.eval(), copy.deepcopy(model)):
        assert torch.equal(twin(images), want)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), want)


@pytest.mark.usefixtures("by_place")
def test_a_router_from_outside_gets_the_gradient_of_its_loss():
    gradients = []
    for mode in ("injected", "manual"):
        model = _model(auxiliary_mode=mode, importance_loss_weight=3.0).train()
        loss = model(torch.ones(2, 3, 16, 16)).square().sum()
        (loss if mode == "injected" else loss + vmoe_torch.auxiliary_loss(model)).backward()
        gradients.append(model.blocks[1].mlp.router.weight.grad)
    torch.testing.assert_close(*gradients)
    model = _model(importance_loss_weight=0.0).train()
    model(torch.ones(2, 3, 16, 16)).square().sum().backward()
    assert (model.blocks[1].mlp.router.weight.grad - gradients[0]).abs().max() > 1e-4


def test_a_router_says_what_it_does_not_take(monkeypatch):
    class WithoutOrder(ByPlace):
        ROUTING = ("capacity_factor", "eval_capacity_factor")
        batch_priority, priority = False, "max"

        def set_routing(self, *, capacity_factor, eval_capacity_factor):
            self.capacity_factor = capacity_factor
            self.eval_capacity_factor = eval_capacity_factor or capacity_factor

    monkeypatch.setitem(ROUTERS, "by_place", WithoutOrder)
    model = _model().eval()
    vmoe_torch.set_routing(model, capacity_factor=1.5)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert "capacity_factor=1.5" in repr(model)
    with pytest.raises(ValueError, match="routing must be among capacity_factor, eval_capacity_factor, group_size in"):
        vmoe_torch.set_routing(model, num_selected_experts=1)


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[str(operator).removesuffix(".default")] += 1
        return operator(*args, **(kwargs or {}))


def test_what_a_forward_launches():
    """The router, the slots and the experts; nothing is copied, and a record costs nothing."""
    layer, x = MoeMlp(16, num_experts=4, group_size=2).eval(), torch.randn(5, 7, 16)
    with torch.no_grad(), Count() as count:
        layer(x)
    launched = count.counts - Counter({"aten.view": 2, "aten._unsafe_view": 2, "aten.detach": 1})
    assert launched == {"vmoe.router": 1, "vmoe.assign_slots": 1, "vmoe.moe_mlp": 1}


def test_random_routers_route_once():
    layer = MoeMlp(16, num_experts=4).eval()
    with random_routers(nn.Sequential(layer)), Count() as count:
        layer(torch.randn(2, 7, 16))
    assert count.counts["vmoe.router"] == count.counts["vmoe.assign_slots"] == 1


def test_a_wrapped_router_is_still_controlled():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args)

    layer, x = MoeMlp(16, num_experts=4, capacity_factor=4.0).eval(), torch.randn(2, 7, 16)
    with vmoe_torch.routing(nn.Sequential(layer), capacity_factor=0.3, num_selected_experts=1):
        want = layer(x)
        layer.router = Wrapper(layer.router)
        assert torch.equal(layer(x), want)
    assert (layer.num_selected_experts, layer.capacity_factor) == (2, 4.0)
    assert not torch.equal(layer(x), want)


def test_a_scripted_layer_refuses_expert_choice():
    layer = MoeMlp(16, num_experts=4, router="expert_choice").eval()
    with pytest.raises(RuntimeError, match="a scripted MoeMlp must route by top_experts or threshold, got expert_ch"):
        torch.jit.script(nn.Sequential(layer))
