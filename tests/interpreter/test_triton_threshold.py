"""Threshold routing in Triton, under the interpreter, against the eager twins: what takes slots, and gradients."""

import pytest
import torch

from vmoe_torch.layers import MoeMlp


@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("options", [{"mean_selected_experts": 1.4}, {"gate_threshold": 0.4}], ids=str)
def test_layer_is_that_of_the_twins(options, batch_priority):
    found = []
    for impl in ("auto", "reference"):
        torch.manual_seed(0)
        layer = MoeMlp(
            8, num_experts=3, router="threshold", group_size=2, batch_priority=batch_priority, impl=impl, **options
        )
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        y = layer(x)
        y.square().sum().backward()
        kept = layer.record.slots >= 0
        assert not kept[~layer.record.selected].any()
        assert layer.record.slots[kept].unique().numel() == int(kept.sum())
        found.append([kept, y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
