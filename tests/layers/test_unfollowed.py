"""A loop that accumulates or scales without saying so is told once; no other is."""

import gc
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from timm.optim import create_optimizer_v2
from torch import nn

import vmoe_torch
from tests.helpers.auxiliary import batches, tiny
from vmoe_torch.layers import set_auxiliary_gradient_scale, unfollowed
from vmoe_torch.layers.unfollowed import SEEN

ACCUMULATES = "gradients are accumulated.*vmoe_torch.follow_loss_scale.*vmoe_torch.trainers"
SCALES = "a GradScaler is in use.*vmoe_torch.follow_loss_scale"


@pytest.fixture(autouse=True)
def _no_scaler_left():
    """A scaler of another test is not in use."""
    torch._dynamo.reset()
    gc.collect()


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def told(record: list[warnings.WarningMessage]) -> int:
    return sum(issubclass(entry.category, vmoe_torch.AuxiliaryLossWarning) for entry in record)


def accumulate(run: nn.Module, optimizer: torch.optim.Optimizer, set_to_none: bool = True) -> None:
    """Three updates of three backwards each."""
    for index, x in enumerate(batches(9)):
        (loss_of(run, x) / 3).backward()
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)


def scale(model: nn.Module) -> None:
    """Three scaled updates."""
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    for x in batches(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_accumulating_loop_is_told_once(compile):
    model = tiny(depth=4)
    run = torch.compile(model, backend="aot_eager") if compile else model
    with pytest.warns(vmoe_torch.AuxiliaryLossWarning, match=ACCUMULATES) as record:
        accumulate(run, torch.optim.AdamW(model.parameters()))
    assert told(record) == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_accumulating_loop_is_told_whatever_its_optimizer(fused, set_to_none):
    model = tiny(depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    with pytest.warns(vmoe_torch.AuxiliaryLossWarning, match=ACCUMULATES) as record:
        accumulate(model, optimizer, set_to_none)
    assert told(record) == 1


@pytest.fixture(params=[None, True, False], ids=["whole", "reentrant", "recomputed"])
def checkpointed(request):
    """A model, and whether it recomputes."""
    before = use_reentrant_ckpt()
    model = tiny()
    if request.param is not None:
        set_reentrant_ckpt(request.param)
        model.set_grad_checkpointing()
    yield model
    set_reentrant_ckpt(before)


def test_loop_with_a_scaler_is_told_once(checkpointed):
    with pytest.warns(vmoe_torch.AuxiliaryLossWarning, match=SCALES) as record:
        scale(checkpointed)
    assert told(record) == 1


def test_scaler_that_comes_later_is_told():
    model = tiny(depth=2)
    (x,) = batches(1)
    loss_of(model, x).backward()
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.warns(vmoe_torch.AuxiliaryLossWarning, match=SCALES):
        scaler.scale(loss_of(model, x)).backward()


def test_disabled_scaler_is_not_told():
    model = tiny(depth=2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for x in batches(2):
        model.zero_grad()
        scaler.scale(loss_of(model, x)).backward()


def test_scaler_of_a_training_that_is_over_is_not_told():
    model = tiny(depth=2)
    (x,) = batches(1)
    gc.disable()
    try:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        # Nobody holds it but itself, as where a trainer and its parts refer to each other.
        scaler.itself = scaler
        del scaler
        loss_of(model, x).backward()
    finally:
        gc.enable()


def test_layers_share_the_look_for_a_scaler(monkeypatch):
    looks = []
    monkeypatch.setattr(unfollowed, "_scaler_lives", lambda: looks.append(1))
    model = tiny(depth=4)
    for x in batches(2):
        model.zero_grad()
        loss_of(model, x).backward()
    assert len(looks) == 2


def test_followed_loop_is_not_told():
    model = tiny(depth=2)
    scaler = torch.amp.GradScaler("cpu")
    for x in batches(4):
        loss = loss_of(model, x)
        vmoe_torch.follow_loss_scale(loss)
        scaler.scale(loss / 4).backward()


def test_loop_that_sets_the_scale_is_not_told():
    model = tiny(depth=2)
    set_auxiliary_gradient_scale(0.5)
    try:
        for x in batches(2):
            (loss_of(model, x) / 2).backward()
    finally:
        set_auxiliary_gradient_scale(1.0)


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        torch.optim.SGD,
        torch.optim.AdamW,
        lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True),
        lambda parameters, lr: create_optimizer_v2(parameters, opt="lamb", lr=lr),
        lambda parameters, lr: create_optimizer_v2(parameters, opt="lookahead_adan", lr=lr),
    ],
    ids=["sgd", "adamw", "fused", "lamb", "lookahead"],
)
def test_plain_loop_is_not_told(make, set_to_none):
    model = tiny(depth=2)
    optimizer = make(model.parameters(), lr=1e-3)
    for x in batches(5):
        loss_of(model, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def test_lbfgs_is_not_told():
    model = tiny(depth=2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    (x,) = batches(1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def test_two_backwards_at_different_weights_are_not_told():
    """Sharpness-aware minimisation."""
    model = tiny(depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for x in batches(3):
        loss_of(model, x).backward()
        steps = [0.01 * p.grad for p in model.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), steps)
        optimizer.zero_grad()
        loss_of(model, x).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), steps)
        optimizer.step()
        optimizer.zero_grad()


def test_two_optimizers_are_not_told():
    """A discriminator of which the generator's step leaves gradients behind."""
    discriminator, generator = tiny(depth=2), nn.Conv2d(3, 3, 1)
    steps = [torch.optim.Adam(model.parameters()) for model in (discriminator, generator)]
    for x in batches(3):
        steps[0].zero_grad()
        (loss_of(discriminator, x) - loss_of(discriminator, generator(x).detach())).backward()
        steps[0].step()
        steps[1].zero_grad()
        loss_of(discriminator, generator(x)).backward()
        steps[1].step()


def test_many_forwards_and_backwards_of_one_step_are_not_told():
    model = tiny(depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    a, b = batches(2)
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model, a) + loss_of(model, b)).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_of(model, a)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()


def test_gradients_without_accumulation_are_not_told():
    model = tiny(depth=2)
    for x in batches(3):
        torch.autograd.grad(loss_of(model, x), list(model.parameters()))


def test_checkpointed_loop_is_not_told(checkpointed):
    optimizer = torch.optim.SGD(checkpointed.parameters(), lr=1e-3)
    for x in batches(3):
        loss_of(checkpointed, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_nothing_is_kept_of_a_model():
    gc.collect()
    before = len(SEEN)
    model = tiny(depth=2)
    loss_of(model, batches(1)[0]).backward()
    assert len(SEEN) == before + 1
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert len(SEEN) == before


def test_process_prints_it_once():
    code = """
import torch, timm, vmoe_torch
for seed in range(2):
    model = timm.create_model("test_vmoe", img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=3)
    for _ in range(3):
        (model(torch.randn(2, 3, 32, 32)).mean() / 3).backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("AuxiliaryLossWarning") == 1, done.stderr
