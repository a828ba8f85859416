"""Small models whose routing drops tokens."""

import pytest
import timm
import torch

SIZE = {"img_size": 16, "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
ROUTING = {"num_experts": 4, "num_selected_experts": 2, "capacity_factor": 0.5, "capacity_multiple_of": 1}


@pytest.fixture
def build():
    """Builds a model of random weights, every MLP an MoE layer, in eval mode."""

    def build(**kwargs):
        model = timm.create_model("test_vmoe", **{**SIZE, **ROUTING, "moe_layers": "every1", **kwargs}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model

    return build
