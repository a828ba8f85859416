"""Weights that a run begins with, adapted to its model as fine-tuning wants it."""

import sys

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from vmoe_torch.layers.int8_experts import refuse_int8
from vmoe_torch.models.vmoe import VMoE
from vmoe_torch.train.build import create_model, upcycled
from vmoe_torch.train.checkpoint import load_weights
from vmoe_torch.train.config import ModelConfig
from vmoe_torch.weights.adapt import load_adapted
from vmoe_torch.weights.conversion import weights_of
from vmoe_torch.weights.sources import read_weights


def build_starting_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The model that a run begins with: as `build_model`, with the weights that the configuration names.

    Raises:
        ValueError: as `build_model`, and if weights cannot be had or do not fit.
    """
    model = create_model(config, num_classes, config.pretrained)
    if config.pretrained and config.drop_head:
        model.reset_classifier(num_classes)
    if config.checkpoint is not None:
        load_start(model, config.checkpoint, config.drop_head)
    refuse_int8(model, "to be trained")
    return upcycled(model, config)


def load_start(model: nn.Module, source: str, drop_head: bool = False) -> None:
    """Loads weights into a model, adapting a Vision Transformer's resolution and any model's number of classes.

    A head of another number of classes stays as it was, and a tanh layer before it that the model lacks is left out.

    Args:
        model: that of the run; nothing in it changes on an error.
        source: what `read_weights` reads. Routing is that of the run's configuration.
        drop_head: whether to keep the model's own head in any case.

    Raises:
        ValueError: if there are no such weights, or all but the head and the resolution is not the model's.
    """
    weights = read_weights(source, progress=sys.stderr.isatty())
    state = weights_of(weights.state)
    if isinstance(model, VMoE):
        load_adapted(model, state, source, drop_head=drop_head, grid=weights.grid)
        return
    own = model.state_dict()
    if isinstance(model, VisionTransformer):
        state = vit_filter_fn(_on_the_models_grid(state, model, weights.grid), model)
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    for name in (classifier,) if isinstance(classifier, str) else classifier:
        head = {key: value for key, value in own.items() if key.startswith(f"{name}.")}
        if drop_head or any(key in state and state[key].shape != value.shape for key, value in head.items()):
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")} | head
    load_weights(model, state)


def _on_the_models_grid(
    state: dict[str, Tensor], model: VisionTransformer, grid: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Positions of a known grid, resized as timm does, which reads their number as a square; older ones copy equal
    numbers."""
    position = state.get("pos_embed")
    if grid is None or position is None or tuple(grid) == tuple(model.patch_embed.grid_size):
        return state
    before = position.shape[1] - grid[0] * grid[1]
    image = position[:, before:].float().unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(model.patch_embed.grid_size), mode="bicubic", antialias=True)
    patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(position.dtype)
    return {**state, "pos_embed": torch.cat([position[:, :before], patches], 1)}
