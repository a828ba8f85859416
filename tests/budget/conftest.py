"""A small model that leans on its experts, and images that it was fitted to."""

import pytest
import timm
import torch
import torch.nn.functional as F


@pytest.fixture(scope="session")
def fitted():
    """(model, batches): 4 MoE layers, fitted for some updates to 4 classes of 64 patterned images."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 1, 16, 16, generator=generator)
    labels = torch.arange(64) % 4
    images = patterns[labels] + 1.5 * torch.randn(64, 1, 16, 16, generator=generator)
    torch.manual_seed(0)
    model = timm.create_model(
        "test_vmoe",
        img_size=16,
        in_chans=1,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        moe_layers="every1",
        num_experts=4,
        num_selected_experts=2,
        capacity_factor=1.05,
        capacity_multiple_of=1,
        batch_priority=False,
        num_classes=4,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), [(images[:32], labels[:32]), (images[32:], labels[32:])]
