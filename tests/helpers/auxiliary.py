"""Measures what the auxiliary gradient of each router was multiplied by.

The task's loss is 0 times the output, so all that reaches a router is the auxiliary gradient; the reference is the
gradient of `auxiliary_loss` alone.
"""

import pytest
import torch
from torch import Tensor, nn

import vmoe_torch
from tests.tiny import tiny_model


def tiny(auxiliary_mode: str = "injected", noise_std: float = 0.0, depth: int = 4) -> nn.Module:
    """A MoE layer in every other block; the same weights each time."""
    torch.manual_seed(1)
    return tiny_model(
        depth=depth,
        num_classes=3,
        group_size=2,
        auxiliary_mode=auxiliary_mode,
        noise_std=noise_std,
        importance_loss_weight=0.5,
        load_loss_weight=0.25,
        gshard_loss_weight=0.125,
    )


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(count)]


def no_loss(output: Tensor, target: Tensor) -> Tensor:
    """A task loss without a gradient of its own."""
    return 0.0 * output.sum()


def router_gradients(model: nn.Module) -> list[Tensor]:
    return [layer.router.weight.grad.clone() for layer in vmoe_torch.moe_layers(model).values()]


def reference(images: list[Tensor], **kwargs) -> list[Tensor]:
    """The gradient of auxiliary_loss alone, averaged over batches."""
    model = tiny("manual", **kwargs)
    for x in images:
        torch.manual_seed(3)
        model(x)
        (vmoe_torch.auxiliary_loss(model) / len(images)).backward()
    gradients = router_gradients(model)
    assert gradients
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)
    return gradients


def multipliers(model: nn.Module, wanted: list[Tensor]) -> list[float]:
    """Per router, what the wanted gradient was multiplied by; fails where the directions differ."""
    factors = []
    for got, want in zip(router_gradients(model), wanted, strict=True):
        factor = ((got * want).sum() / want.square().sum()).item()
        torch.testing.assert_close(got, factor * want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
        factors.append(factor)
    return factors


def assert_multiplier_is_one(model: nn.Module, wanted: list[Tensor]) -> None:
    assert multipliers(model, wanted) == pytest.approx([1.0] * len(wanted), rel=1e-5)
