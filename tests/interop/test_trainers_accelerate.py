"""The auxiliary gradient under accelerate is that of a loss averaged over the accumulation steps."""

import pytest
import torch
from torch import nn

import vmoe_torch
from tests.helpers.auxiliary import assert_multiplier_is_one, batches, multipliers, no_loss, reference, tiny

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: it is in the extra `interop`")


def run(accelerator, count: int) -> nn.Module:
    model = accelerator.prepare(tiny())
    for x in batches(count):
        with accelerator.accumulate(model):
            accelerator.backward(no_loss(model(x), x))
    return model


@pytest.mark.parametrize("steps", [1, 4])
def test_accelerator_that_follows(steps):
    from vmoe_torch.trainers.accelerate import follow

    accelerator = follow(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps))
    backward = accelerator.backward
    assert follow(accelerator).backward is backward
    assert_multiplier_is_one(run(accelerator, steps), reference(batches(steps)))


def test_accelerator_that_follows_a_scaler():
    from vmoe_torch.trainers.accelerate import follow

    accelerator = follow(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert multipliers(run(accelerator, 2), reference(batches(2))) == pytest.approx([1024.0] * 2, rel=1e-5)


def test_accelerator_that_does_not_follow_is_told():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    with pytest.warns(vmoe_torch.AuxiliaryLossWarning, match="vmoe_torch.trainers"):
        model = run(accelerator, 4)
    assert multipliers(model, reference(batches(4))) == pytest.approx([4.0, 4.0], rel=1e-5)
