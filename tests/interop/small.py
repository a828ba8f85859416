"""Small models whose routing drops tokens, for tests against other people's tools."""

import timm
import torch
from torch import Tensor, nn

SIZE = {"img_size": 16, "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
ROUTING = {"num_experts": 4, "num_selected_experts": 2, "capacity_factor": 0.5, "capacity_multiple_of": 1}


def build(**kwargs) -> nn.Module:
    """A model of random weights, every MLP an MoE layer, in eval mode."""
    model = timm.create_model("test_vmoe", **{**SIZE, **ROUTING, "moe_layers": "every1", **kwargs}).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def images(count: int = 5) -> Tensor:
    """(B, 1, 16, 16): of five, groups of 2 or 4 leave a smaller last one."""
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(4))
