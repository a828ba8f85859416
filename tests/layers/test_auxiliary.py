"""The multiplier of the auxiliary gradient is 1 in every way of running a backward.

The task's loss is 0 times the output, so all that reaches a router is the auxiliary gradient; the reference is the
gradient of `auxiliary_loss` alone.
"""

import copy
import gc
import io
import weakref

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import vmoe_torch
import vmoe_torch.timm_train
from tests.helpers.auxiliary import (
    assert_multiplier_is_one,
    batches,
    multipliers,
    no_loss,
    reference,
    router_gradients,
    tiny,
)
from vmoe_torch.layers import auxiliary_gradient_scale, set_auxiliary_gradient_scale

CPU = torch.device("cpu")


def run_task(model: nn.Module, images: list[Tensor], scaler: torch.amp.GradScaler | None = None, compile=None) -> None:
    """timm's training step up to the optimiser: the loss of each batch over their number, scaled."""
    task = ClassificationTask(model, criterion=no_loss, verbose=False)
    if compile is not None:
        task.compile(backend=compile)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in images:
        torch.manual_seed(3)
        loss = task(x, torch.zeros(len(x), dtype=torch.long))["loss"]
        loss /= len(images)
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)


@pytest.fixture(autouse=True)
def _fresh():
    """No graph compiled for one test serves another, and the scale is back at 1."""
    torch._dynamo.reset()
    assert auxiliary_gradient_scale(CPU).item() == 1.0
    yield
    set_auxiliary_gradient_scale(1.0)


@pytest.fixture
def reentrant():
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(True)
    yield
    set_reentrant_ckpt(before)


def test_multiplier_plain_loop():
    (x,) = batches(1)
    model = tiny()
    no_loss(model(x), x).backward()
    assert_multiplier_is_one(model, reference([x]))


def test_multiplier_plain_task():
    model = tiny()
    run_task(model, batches(1))
    assert_multiplier_is_one(model, reference(batches(1)))


def test_multiplier_accumulation():
    model = tiny()
    run_task(model, batches(4))
    assert_multiplier_is_one(model, reference(batches(4)))


def test_multiplier_scaled():
    model = tiny()
    run_task(model, batches(1), torch.amp.GradScaler("cpu", init_scale=65536.0))
    assert_multiplier_is_one(model, reference(batches(1)))


def test_multiplier_scaled_accumulation():
    model = tiny()
    run_task(model, batches(3), torch.amp.GradScaler("cpu", init_scale=65536.0))
    assert_multiplier_is_one(model, reference(batches(3)))


def test_multiplier_checkpointed():
    model = tiny()
    model.set_grad_checkpointing()
    run_task(model, batches(2))
    assert_multiplier_is_one(model, reference(batches(2)))


def test_multiplier_checkpointed_reentrant(reentrant):
    model = tiny()
    model.set_grad_checkpointing()
    run_task(model, batches(2), torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert_multiplier_is_one(model, reference(batches(2)))


def test_multiplier_checkpointed_with_noise():
    model = tiny(noise_std=1.0)
    model.set_grad_checkpointing()
    run_task(model, batches(2))
    assert_multiplier_is_one(model, reference(batches(2), noise_std=1.0))


def test_multiplier_compiled():
    model = tiny()
    run_task(model, batches(2), torch.amp.GradScaler("cpu", init_scale=1024.0), compile="aot_eager")
    assert_multiplier_is_one(model, reference(batches(2)))


# A layer's record is a side effect: Dynamo breaks the graph at a checkpoint, and there warns of its own look at .grad.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_multiplier_compiled_checkpointed():
    model = tiny()
    model.set_grad_checkpointing()
    run_task(model, batches(2), compile="aot_eager")
    assert_multiplier_is_one(model, reference(batches(2)))


# monkeypatch would hide the option for good when it puts it back.
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_multiplier_compiled_checkpointed_in_one_graph():
    (x,) = batches(1)
    model = tiny()
    model.set_grad_checkpointing()
    loss = no_loss(torch.compile(model, backend="aot_eager", fullgraph=True)(x), x)
    set_auxiliary_gradient_scale(0.25)
    loss.backward()
    set_auxiliary_gradient_scale(1.0)
    assert multipliers(model, reference([x])) == pytest.approx([0.25, 0.25], rel=1e-5)


@pytest.mark.slow
def test_multiplier_compiled_inductor():
    model = tiny(depth=2)
    run_task(model, batches(2), torch.amp.GradScaler("cpu", init_scale=1024.0), compile="inductor")
    assert_multiplier_is_one(model, reference(batches(2), depth=2))


def test_multiplier_own_scale():
    """A loop that scales by itself says so with set_auxiliary_gradient_scale, by a number or a tensor."""
    (x,) = batches(1)
    for scale in (8.0, torch.tensor(8.0)):
        model = tiny()
        set_auxiliary_gradient_scale(scale)
        (8.0 * no_loss(model(x), x)).backward()
        set_auxiliary_gradient_scale(1.0)
        assert multipliers(model, reference([x])) == pytest.approx([8.0, 8.0], rel=1e-5)


def test_scale_is_one_after_a_task():
    model = tiny()
    run_task(model, batches(1), torch.amp.GradScaler("cpu", init_scale=65536.0))
    assert auxiliary_gradient_scale(CPU).item() == 1.0
    model.zero_grad()
    (x,) = batches(1)
    no_loss(model(x), x).backward()
    assert_multiplier_is_one(model, reference([x]))


def test_task_subclass_that_combines_losses():
    """One hook, on the loss that leaves the outermost forward."""

    class Halved(ClassificationTask):
        def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
            result = super().forward(input, target)
            return {**result, "loss": 0.5 * result["loss"]}

    (x,) = batches(1)
    model = tiny()
    Halved(model, criterion=no_loss, verbose=False)(x, x)["loss"].backward()
    assert_multiplier_is_one(model, reference([x]))


def test_task_without_gradient():
    (x,) = batches(1)
    task = ClassificationTask(tiny(), criterion=no_loss, verbose=False)
    with torch.no_grad():
        assert task(x, x)["loss"].item() == 0.0


def test_manual_equals_injected():
    (x,) = batches(1)
    target = torch.tensor([0, 1, 2, 0])
    gradients = []
    for mode in ("injected", "manual"):
        model = tiny(mode, noise_std=1.0)
        torch.manual_seed(3)
        loss = nn.functional.cross_entropy(model(x), target)
        if mode == "manual":
            loss = loss + vmoe_torch.auxiliary_loss(model)
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, got in gradients[0].items():
        torch.testing.assert_close(got, gradients[1][name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_eval_injects_no_loss():
    (x,) = batches(1)
    model = tiny().eval()
    no_loss(model(x), x).backward()
    assert all(gradient.abs().max() == 0 for gradient in router_gradients(model))


@pytest.mark.parametrize("mode", ["injected", "manual"])
def test_copies_after_forward_hold_no_graph(mode):
    (x,) = batches(1)
    model = tiny(mode)
    model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        for layer in vmoe_torch.moe_layers(other).values():
            assert all(not isinstance(value, Tensor) for value in vars(layer.record).values())
        torch.testing.assert_close(other.eval()(x), model.eval()(x))
        model.train()


def test_ema_after_forward():
    (x,) = batches(1)
    model = tiny()
    model(x).sum().backward()
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    ema.update(model)
    torch.testing.assert_close(ema.module.head.weight, model.head.weight - 0.5)
    assert ema.module(x).shape == (4, 3)


class _Saved:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_by(model: nn.Module, x: Tensor) -> tuple[Tensor, list[weakref.ref]]:
    """The output, and a reference to everything that its graph saved."""
    saved = []

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor.detach())
        saved.append(weakref.ref(holder))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        return model(x), saved


@pytest.mark.parametrize("backward", [False, True], ids=["dropped", "backward"])
def test_injected_keeps_no_graph(backward):
    (x,) = batches(1)
    model = tiny()
    output, saved = saved_by(model, x)
    assert len(saved) > 50
    assert all(reference() is not None for reference in saved)
    if backward:
        output.sum().backward()
    del output
    gc.collect()
    assert all(reference() is None for reference in saved)


def test_manual_keeps_the_graph_of_the_loss_until_the_next_forward():
    (x,) = batches(1)
    model = tiny("manual")
    output, saved = saved_by(model, x)
    del output
    gc.collect()
    assert any(reference() is not None for reference in saved)
    with torch.no_grad():
        model(x)
    gc.collect()
    assert all(reference() is None for reference in saved)
