"""A model as a graph of PyTorch's own operators: the eager twins, which define our ops, stand in for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vmoe_torch.control import eval_mode, moe_layers


@torch.no_grad()
def export_program(model: nn.Module, images: Tensor, *, dynamic_batch: bool = False) -> ExportedProgram:
    """Traces a model in eval mode, routed as it is set now.

    Args:
        model: any; its MoE layers keep no record of a forward in the program.
        images: (B, C, H, W) example. The program takes batches of exactly B, as the groups and their capacities are
            built into it.
        dynamic_batch: whether it takes batches of any size instead, 1 included. Groups must then be single images.

    Returns:
        A program from one batch to the logits. It has no operator of ours: torch alone runs it.

    Raises:
        ValueError: if there is no image, or the groups do not allow a dynamic batch.
    """
    if len(images) == 0:
        raise ValueError("images must hold at least one, got none")
    shapes = None
    if dynamic_batch:
        for name, layer in moe_layers(model).items():
            if layer.group_size != 1:
                group = layer.group_size or "batch"
                raise ValueError(f"group_size must be 'image' for a dynamic batch, got {group!r} in {name}")
        # A batch of 1 would be taken for a constant.
        images = images if len(images) > 1 else images.expand(2, *images.shape[1:])
        shapes = ({0: Dim("batch", min=1)},)
    with eval_mode(model), _eager_twins(model):
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


@contextmanager
def _eager_twins(model: nn.Module) -> Iterator[None]:
    layers = moe_layers(model).values()
    before = [layer.impl for layer in layers]
    for layer in layers:
        layer.impl = "reference"
    try:
        yield
    finally:
        for layer, impl in zip(layers, before):
            layer.impl = impl


def save_pt2(program: ExportedProgram, path: Path | str) -> None:
    """Writes a .pt2 file, to be read by `torch.export.load(path).module()`."""
    torch.export.save(program, path)
