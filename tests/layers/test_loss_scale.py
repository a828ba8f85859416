"""A followed loss speaks for the layers under it, in its own backward; without one the factor is 1 and counts once."""

import gc
import threading
import weakref

import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import vmoe_torch
from tests.helpers.auxiliary import (
    assert_multiplier_is_one,
    batches,
    multipliers,
    no_loss,
    reference,
    tiny,
)
from tests.parallel.processes import run
from vmoe_torch.layers import (
    auxiliary_gradient_scale,
    inject_auxiliary_loss,
    loss_scale,
    set_auxiliary_gradient_scale,
)

# Dynamo's own look at the .grad of a compiled block's input.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture(params=["eager", "compiled", "recomputed", "reentrant", "reentrant compiled"])
def made(request):
    """Builds models that run their backward in each way."""
    before = use_reentrant_ckpt()
    set_reentrant_ckpt("reentrant" in request.param)

    def make() -> nn.Module:
        model = tiny()
        if request.param in ("recomputed", "reentrant", "reentrant compiled"):
            model.set_grad_checkpointing()
        for block in model.blocks if "compiled" in request.param else ():
            block.compile(backend="aot_eager")
        return model

    yield make
    set_reentrant_ckpt(before)


def followed(model: nn.Module, x: Tensor, weight: float = 1.0) -> Tensor:
    loss = no_loss(model(x), x)
    vmoe_torch.follow_loss_scale(loss, weight)
    return loss


def test_accumulating_loop(made):
    model = made()
    for x in batches(4):
        (followed(model, x) / 4).backward()
    assert_multiplier_is_one(model, reference(batches(4)))


def test_scaler():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    for x in batches(2):
        scaler.scale(followed(model, x) / 2).backward()
    scaler.unscale_(optimizer)
    assert_multiplier_is_one(model, reference(batches(2)))


def test_scale_beyond_float16_in_its_default_dtype():
    (x,) = batches(1)
    model = tiny()
    loss_scale.BUFFERS.clear()
    torch.set_default_dtype(torch.float16)
    try:
        (131072.0 * followed(model, x)).backward()
        # The scale that a loop sets by hand, too.
        set_auxiliary_gradient_scale(131072.0)
        assert auxiliary_gradient_scale(x.device).item() == 131072.0
    finally:
        set_auxiliary_gradient_scale(1.0)
        torch.set_default_dtype(torch.float32)
    assert multipliers(model, reference([x])) == pytest.approx([131072.0] * 2, rel=1e-5)


@pytest.mark.parametrize("backwards", [2, 3])
@pytest.mark.parametrize("follow", [False, True])
def test_backwards_through_one_forward_count_once(made, backwards, follow):
    (x,) = batches(1)
    model = made()
    loss = no_loss(model(x), x)
    if follow:
        vmoe_torch.follow_loss_scale(loss)
    for _ in range(backwards):
        loss.backward(retain_graph=True)
    assert_multiplier_is_one(model, reference([x]))


def test_forwards_before_one_backward_count_each(made):
    model = made()
    outputs = [model(x) for x in batches(3)]
    (sum(no_loss(output, output) for output in outputs) / 3).backward()
    assert multipliers(model, reference(batches(3))) == pytest.approx([3.0, 3.0], rel=1e-5)
    model.zero_grad()
    losses = [followed(model, x) for x in batches(3)]
    (sum(losses) / 3).backward()
    assert_multiplier_is_one(model, reference(batches(3)))


@pytest.mark.parametrize("forwards_first", [False, True])
def test_losses_of_two_models_in_one_backward(made, forwards_first):
    (x,) = batches(1)
    first, second, third = made(), made(), made()
    if forwards_first:
        outputs = [model(x) for model in (first, second, third)]
        losses = [no_loss(output, x) for output in outputs]
    else:
        losses = [no_loss(model(x), x) for model in (first, second, third)]
    for loss in losses[:2]:
        vmoe_torch.follow_loss_scale(loss)
    (3 * losses[0] + 5 * losses[1] + 7 * losses[2]).backward()
    for model, factor in ((first, 3.0), (second, 5.0), (third, 1.0)):
        assert multipliers(model, reference([x])) == pytest.approx([factor] * 2, rel=1e-5)


def test_threads_do_not_meet():
    (x,) = batches(1)
    models = [tiny() for _ in range(4)]
    barrier = threading.Barrier(4)

    def wait(gradient: Tensor) -> None:
        barrier.wait(60)

    def train(model: nn.Module, scale: float) -> None:
        loss = no_loss(model(x), x)
        if scale != 1.0:
            vmoe_torch.follow_loss_scale(loss)
        # Everybody is inside a backward before anybody's layers are.
        loss.register_hook(wait)
        (scale * loss).backward()

    scales = [1.0, 2.0, 3.0, 65536.0]
    threads = [threading.Thread(target=train, args=pair) for pair in zip(models, scales)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, scale in zip(models, scales):
        assert multipliers(model, reference([x])) == pytest.approx([scale] * 2, rel=1e-5)


def test_the_followed_part_of_a_followed_loss_counts():
    (x,) = batches(1)
    model = tiny()
    loss = followed(model, x)
    total = 0.5 * loss
    vmoe_torch.follow_loss_scale(total)
    (4.0 * total).backward()
    assert multipliers(model, reference([x])) == pytest.approx([2.0, 2.0], rel=1e-5)


def test_first_follower_of_a_loss_stays():
    (x,) = batches(1)
    model = tiny()
    loss = followed(model, x, weight=0.25)
    vmoe_torch.follow_loss_scale(loss)
    loss.backward()
    assert multipliers(model, reference([x])) == pytest.approx([0.25, 0.25], rel=1e-5)


def test_loss_changed_in_place_is_followed_anew():
    (x,) = batches(1)
    model = tiny()
    loss = no_loss(model(x), x)
    loss /= 2
    vmoe_torch.follow_loss_scale(loss)
    loss /= 4
    loss.backward()
    assert multipliers(model, reference([x])) == pytest.approx([0.25, 0.25], rel=1e-5)


def test_scale_is_gone_after_its_backward():
    (x,) = batches(1)
    model = tiny()
    loss = followed(model, x, weight=0.0)
    loss.backward(retain_graph=True)
    (no_loss(model(x), x)).backward()
    assert_multiplier_is_one(model, reference([x]))


def plain(x: Tensor) -> Tensor:
    """The gradient of an image without auxiliary losses."""
    model = tiny()
    for layer in vmoe_torch.moe_layers(model).values():
        layer.importance_loss_weight = layer.load_loss_weight = layer.gshard_loss_weight = 0.0
    return torch.autograd.grad(task_loss(model, x), x)[0]


def task_loss(model: nn.Module, x: Tensor) -> Tensor:
    """A loss with a gradient: the head of a fresh model is 0."""
    return model.forward_features(x).sin().mean()


def test_gradient_of_the_input_is_free_of_it(made):
    x = batches(1)[0].requires_grad_()
    model = made()
    loss = task_loss(model, x)
    if getattr(model, "grad_checkpointing", False) and use_reentrant_ckpt():
        pytest.skip("reentrant checkpoints know no torch.autograd.grad")
    (got,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert got.abs().max() > 1e-6
    torch.testing.assert_close(got, plain(x), rtol=1e-5, atol=1e-9)
    # What the input did not get is there for the router.
    (0.0 * loss).backward()
    assert_multiplier_is_one(model, reference([x.detach()]))


def test_weight_of_zero_leaves_it_to_the_next_backward(made):
    x = batches(1)[0].requires_grad_()
    model = made()
    features = model.forward_features(x)
    loss = features.sin().mean()
    vmoe_torch.follow_loss_scale(loss, weight=0.0)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, plain(x), rtol=1e-5, atol=1e-9)
    model.zero_grad()
    # Not through the follower of the first loss.
    (0.0 * features.sum()).backward()
    assert_multiplier_is_one(model, reference([x.detach()]))


@pytest.mark.parametrize("compile", [False, True])
def test_frozen_model_injects_into_no_input(compile):
    x = batches(1)[0].requires_grad_()
    model = tiny().requires_grad_(False)
    for block in model.blocks if compile else ():
        block.compile(backend="aot_eager")
    task_loss(model, x).backward()
    torch.testing.assert_close(x.grad, plain(x), rtol=1e-5, atol=1e-9)


def test_frozen_router_trains_the_layers_before_it():
    gradients = []
    for mode in ("manual", "injected"):
        model = tiny(mode)
        for layer in vmoe_torch.moe_layers(model).values():
            layer.router.requires_grad_(False)
        (x,) = batches(1)
        loss = no_loss(model(x), x)
        if mode == "manual":
            loss = loss + vmoe_torch.auxiliary_loss(model)
        loss.backward()
        gradients.append(model.patch_embed.proj.weight.grad)
    assert gradients[0].abs().max() > 1e-5
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_weights_given_from_outside_are_trained():
    (x,) = batches(1)
    model = tiny()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    output = torch.func.functional_call(model, weights, (x,))
    names = [f"{name}.router.weight" for name in vmoe_torch.moe_layers(model)]
    got = torch.autograd.grad(no_loss(output, x), [weights[name] for name in names])
    for gradient, want in zip(got, reference([x])):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-7)


def test_followed_inside_a_compiled_function():
    (x,) = batches(1)
    model = tiny()

    @torch.compile(backend="aot_eager")
    def loss_of(x: Tensor) -> Tensor:
        return 3.0 * followed(model, x)

    loss_of(x).backward()
    assert multipliers(model, reference([x])) == pytest.approx([3.0, 3.0], rel=1e-5)


def test_following_keeps_no_graph():
    (x,) = batches(1)
    model = tiny()
    loss = followed(model, x)
    node = weakref.ref(next(n for n in loss_scale.nodes_beneath(loss.grad_fn) if hasattr(n, "vmoe_layer")))
    assert node() is not None
    (2 * loss).backward(retain_graph=True)
    del loss
    gc.collect()
    assert node() is None


def test_failed_backward_of_a_checkpoint_leaves_nothing():
    (x,) = batches(1)
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(True)
    try:
        model = tiny()
        model.set_grad_checkpointing()
        x.requires_grad_()
        x.register_hook(lambda gradient: 1 / 0)
        loss = followed(model, x)
        with pytest.raises(ZeroDivisionError):
            (8 * loss).backward()
    finally:
        set_reentrant_ckpt(before)
    del loss
    assert loss_scale.outer_recomputation() is None
    model = tiny()
    no_loss(model(x.detach()), x).backward()
    assert_multiplier_is_one(model, reference([x.detach()]))


def test_injection_without_a_router_always_counts():
    gates, loss = torch.ones(2, 1, requires_grad=True), torch.ones((), requires_grad=True)
    assert inject_auxiliary_loss(gates, loss).sum().backward() is None
    assert loss.grad == 1.0


def test_follow_loss_scale_of_a_loss_without_gradient():
    vmoe_torch.follow_loss_scale(torch.zeros(()))
    with torch.no_grad():
        vmoe_torch.follow_loss_scale(no_loss(tiny()(batches(1)[0]), None))


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_loss_of_one_element_in_any_shape(shape):
    (x,) = batches(1)
    model = tiny()
    loss = no_loss(model(x), x).reshape(shape)
    vmoe_torch.follow_loss_scale(loss)
    (loss / 2).sum().backward()
    assert multipliers(model, reference([x])) == pytest.approx([0.5, 0.5], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0,), TypeError, "loss must be a tensor, got float"),
        ((torch.zeros(2, requires_grad=True),), ValueError, r"loss must have one real element, got .* shape \(2,\)"),
        ((torch.zeros(0),), ValueError, r"shape \(0,\)"),
        ((torch.zeros((), dtype=torch.complex64),), ValueError, "one real element, got torch.complex64"),
        ((torch.zeros(()), -0.5), ValueError, "weight must be finite and at least 0, got -0.5"),
        ((torch.zeros(()), float("nan")), ValueError, "weight must be finite and at least 0, got nan"),
        ((torch.zeros(()), float("inf")), ValueError, "weight must be finite and at least 0, got inf"),
        ((torch.zeros(()), "1"), TypeError, "weight must be a number, got '1'"),
        ((torch.zeros(()), True), TypeError, "weight must be a number, got True"),
    ],
)
def test_follow_loss_scale_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        vmoe_torch.follow_loss_scale(*arguments)


def accumulate_in_parallel() -> None:
    model = DistributedDataParallel(tiny())
    first, second = batches(2)
    with model.no_sync():
        (followed(model, first) / 2).backward()
    (followed(model, second) / 2).backward()
    assert_multiplier_is_one(model.module, reference(batches(2)))


def test_accumulation_under_ddp(tmp_path):
    run(2, tmp_path, accumulate_in_parallel)
