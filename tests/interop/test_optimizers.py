"""Optimisers: every one that timm lists moves router and experts, and so do weights that follow an average."""

import math
from functools import partial

import pytest
import timm.optim
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import vmoe_torch
from tests.interop.requirement import needs
from tests.parallel.processes import run
from tests.tiny import dropping, grey_images

# Apex and bitsandbytes are other libraries; adahessian wants second derivatives, which the fast ops have not; kron
# compiles itself for half a minute.
LEFT_OUT = ("fused*", "bnb*", "adahessian", "kron*")


def _names() -> list[str]:
    return timm.optim.list_optimizers(exclude_filters=list(LEFT_OUT))


def _fit(model, optimizer, images, labels, steps: int = 2) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_optimizer_of_timm_moves_router_and_experts(tiny, images, labels):
    failed = {}
    for name in _names():
        # The same for each: in another model, capacity may drop all class tokens, and experts have no gradient.
        torch.manual_seed(0)
        model = tiny().train()
        before = {each: value.detach().clone() for each, value in model.named_parameters()}
        options = {}
        if "muon" in name:
            options["fallback_list"] = [f"{layer}.*" for layer in vmoe_torch.moe_layers(model)]
        try:
            optimizer = timm.optim.create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.01, **options)
            losses = _fit(model, optimizer, images, labels)
        except Exception as error:
            failed[name] = repr(error)
            continue
        still = [each for each, value in model.named_parameters() if torch.equal(value, before[each])]
        if still or not all(map(math.isfinite, losses)):
            failed[name] = (still, losses)
    assert failed == {}
    assert len(_names()) > 40


def _train_on_a_part():
    rank, trained = torch.distributed.get_rank(), []
    for optimizer in (torch.optim.AdamW, partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)):
        torch.manual_seed(rank)
        model = dropping().train()
        replica = DistributedDataParallel(model)
        _fit(replica, optimizer(model.parameters(), lr=1e-3), grey_images(4), torch.arange(4), steps=3)
        trained.append(model.state_dict())
    assert all(torch.equal(value, trained[1][name]) for name, value in trained[0].items())


def test_state_in_parts_steps_as_a_whole_one(tmp_path):
    """ZeRO-1 keeps the state of each parameter on one rank; experts, 3-dimensional, are parameters like others."""
    run(2, tmp_path, _train_on_a_part)


def test_schedule_free_averages_every_expert(tiny, images, labels):
    schedulefree = needs("schedulefree")
    model = tiny().train()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
    optimizer.train()
    losses = _fit(model, optimizer, images, labels, steps=10)
    assert losses[-1] < losses[0]
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.eval()
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("decay", [0.5, 0.75])
def test_layer_decay_reaches_the_experts(tiny, decay):
    model = tiny()
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=decay)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scale[id(model.blocks[1].mlp.fc1.weight)] == scale[id(model.blocks[1].attn.qkv.weight)]
    assert scale[id(model.blocks[0].mlp.fc1.weight)] == scale[id(model.blocks[1].mlp.router.weight)] * decay
