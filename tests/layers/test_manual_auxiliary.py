"""`auxiliary_loss` of layers in the "manual" mode: each forward counts in one reading; nothing is kept for nothing."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

import vmoe_torch
from tests.helpers.auxiliary import assert_multiplier_is_one, batches, no_loss, reference, router_gradients, tiny
from vmoe_torch import auxiliary_loss


def losses_of(images: list[Tensor]) -> list[float]:
    """The auxiliary loss of each batch on its own."""
    values = []
    for x in images:
        model = tiny("manual")
        model(x)
        values.append(auxiliary_loss(model).item())
    return values


@pytest.mark.parametrize("checkpointing", [False, True])
def test_crops_of_one_step_are_added(checkpointing):
    model = tiny("manual")
    model.set_grad_checkpointing(checkpointing)
    outputs = [model(x) for x in batches(3)]
    loss = auxiliary_loss(model)
    assert loss.item() == pytest.approx(sum(losses_of(batches(3))), rel=1e-5)
    ((sum(no_loss(output, output) for output in outputs) + loss) / 3).backward()
    assert_multiplier_is_one(model, reference(batches(3)))


def test_manual_crops_equal_the_injected():
    gradients = []
    for mode in ("manual", "injected"):
        model = tiny(mode)
        loss = sum(model.forward_features(x).sin().mean() for x in batches(3))
        if mode == "manual":
            loss = loss + auxiliary_loss(model)
        loss.backward()
        gradients.append(router_gradients(model))
    for manual, injected in zip(*gradients):
        torch.testing.assert_close(manual, injected, rtol=1e-4, atol=1e-7)


def test_reading_after_each_forward_gives_each_once():
    model = tiny("manual")
    outputs, values = [], []
    for x in batches(3):
        outputs.append(model(x))
        values.append(auxiliary_loss(model).item())
    assert values == pytest.approx(losses_of(batches(3)), rel=1e-5)


def test_reading_twice_gives_the_same():
    model = tiny("manual")
    outputs = [model(x) for x in batches(2)]
    first, second = auxiliary_loss(model), auxiliary_loss(model)
    assert first.item() == second.item() == pytest.approx(sum(losses_of(batches(2))), rel=1e-5)
    (no_loss(outputs[0], outputs[0]) + first).backward()
    assert auxiliary_loss(model).item() == first.item()


def test_reading_without_gradients_takes_nothing():
    model = tiny("manual")
    a, b = batches(2)
    wanted = losses_of([a, b])
    outputs = [model(a)]
    with torch.no_grad():
        assert auxiliary_loss(model).item() == pytest.approx(wanted[0], rel=1e-5)
    outputs.append(model(b))
    assert auxiliary_loss(model).item() == pytest.approx(sum(wanted), rel=1e-5)


def test_forward_after_a_backward_starts_anew():
    model = tiny("manual")
    a, b = batches(2)
    kept = [model(a)]
    kept[0].sum().backward()
    kept.append(model(b))
    assert auxiliary_loss(model).item() == pytest.approx(losses_of([b])[0], rel=1e-5)


def test_loss_may_be_read_after_the_backward_of_the_outputs():
    model = tiny("manual")
    outputs = [model(x) for x in batches(2)]
    sum(no_loss(output, output) for output in outputs).backward(retain_graph=True)
    (auxiliary_loss(model) / 2).backward()
    assert_multiplier_is_one(model, reference(batches(2)))


def test_dropped_crops_are_left_out():
    model = tiny("manual")
    a, b = batches(2)
    model(a)
    output = model(b)
    assert auxiliary_loss(model).item() == pytest.approx(losses_of([b])[0], rel=1e-5)
    assert output.shape == (4, 3)


def test_forwards_without_gradients_wait_for_no_reading():
    model = tiny("manual")
    a, b = batches(2)
    output = model(a)
    with torch.no_grad():
        model(b)
    assert auxiliary_loss(model).item() == pytest.approx(losses_of([a])[0], rel=1e-5)
    assert output.requires_grad
    with torch.no_grad():
        model(b)
    assert auxiliary_loss(model).item() == pytest.approx(losses_of([b])[0], rel=1e-5)
    assert not auxiliary_loss(model).requires_grad
    model.eval()
    model(a)
    assert auxiliary_loss(model).item() == pytest.approx(losses_of([a])[0], rel=1e-5)


def test_layer_called_twice_in_a_model_counts_twice():
    layer = next(iter(vmoe_torch.moe_layers(tiny("manual")).values()))
    tokens = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(1))
    layer(tokens)
    first = auxiliary_loss(layer).item()
    output = layer(layer(tokens))
    assert auxiliary_loss(layer).item() > first + 1e-4
    assert output.shape == tokens.shape


def test_unread_losses_are_freed_with_their_outputs():
    model = tiny("manual")
    outputs = [model(x) for x in batches(3)]
    (record, *_) = (layer.record for layer in vmoe_torch.moe_layers(model).values())
    references = list(record.losses)
    assert len(references) == 3
    assert all(reference() is not None for reference in references)
    gc.disable()
    try:
        outputs.clear()
        # The last is the record's own.
        assert [reference() is None for reference in references] == [True, True, False]
        output = model(batches(1)[0])
        assert len(record.losses) <= 2
    finally:
        gc.enable()
    assert output.requires_grad


def test_copies_hold_no_waiting_loss():
    model = tiny("manual")
    output = model(batches(1)[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.record.losses == [] for layer in vmoe_torch.moe_layers(other).values())
        assert auxiliary_loss(other).item() == 0.0
    assert output.requires_grad


def test_compiled_layer_gives_its_last_forward():
    torch._dynamo.reset()
    model = tiny("manual")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    a, b = batches(2)
    outputs = [model(a), run(b)]
    assert auxiliary_loss(model).item() == pytest.approx(losses_of([b])[0], rel=1e-5)
    (no_loss(outputs[1], b) + auxiliary_loss(model)).backward()
    assert_multiplier_is_one(model, reference([b]))
