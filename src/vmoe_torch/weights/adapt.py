"""What loading a state dict adapts: resolution, patches, channels, the head, the members of an ensemble."""

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor, nn

from vmoe_torch.layers.int8_experts import as_loaded
from vmoe_torch.weights.grid import known_grid, zoom_position
from vmoe_torch.weights.names import split_members
from vmoe_torch.weights.tubelets import for_video


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: nn.Module, source_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """timm's ViT filter, but positions resize as in the original, and the pre-logits layer and ensembles are known.

    The grid that positions are of is the one given, else that of the state dict's metadata, else of the arguments and
    the image size that timm has for these weights where they fit; else `zoom_position` says what is taken.
    """
    if source_grid is None:
        source_grid = known_grid(state_dict, model)
    source = state_dict.get("model", state_dict)
    source = dict(source.get("state_dict", source))
    own = model.state_dict()
    # timm's filter knows images alone: what differs for clips goes around it.
    apart = {}
    if own["patch_embed.proj.weight"].dim() == 5:
        source = for_video(source, model, source_grid)
        apart = {name: source.pop(name) for name in ("patch_embed.proj.weight", "pos_embed") if name in source}
    position = source.pop("pos_embed", None)
    filtered = vit_filter_fn(source, model) | apart
    if isinstance(model.pre_logits, nn.Sequential):
        filtered.update({name: value for name, value in source.items() if name.startswith("pre_logits.")})
    if position is not None and "pos_embed" in own:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        if position.shape[-1] == own["pos_embed"].shape[-1]:
            position = zoom_position(position, own["pos_embed"], model.patch_embed.grid_size, prefix, source_grid)
        filtered["pos_embed"] = position
    if model.ensemble_size > 1 and not any(".mlp.members." in name for name in filtered):
        filtered = split_members(filtered, model.ensemble_size)
    return filtered


def adapt_channels(kernel: Tensor, in_chans: int) -> Tensor:
    """A patch embedding's kernel for other images, as timm adapts it from 3 channels (before 1.0.31 from 3 alone).

    Args:
        kernel: (D, channels, height, width), or of tubelets (D, channels, frames, height, width).
        in_chans: channels of the images to come.

    Returns:
        (D, in_chans, ...): one channel is the sum of all, several repeat them and keep the sum's scale.
    """
    channels = kernel.shape[1]
    if in_chans == channels:
        return kernel
    wide = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    if in_chans == 1:
        return wide.sum(1, keepdim=True).to(kernel.dtype)
    repeated = torch.cat([wide] * -(-in_chans // channels), 1)[:, :in_chans]
    return (repeated * (channels / in_chans)).to(kernel.dtype)


def load_adapted(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    drop_head: bool = False,
    grid: tuple[int, int] | None = None,
) -> None:
    """Loads a state dict, adapting resolution, patches, channels and head; all else must fit exactly.

    Another number of classes keeps the model's own head, and leaves out a pre-logits layer that the model lacks, as the
    original's fine-tuning does. Other channels are summed or repeated as in timm. Thresholds that the state lacks are
    those that nothing was found for.

    Args:
        model: a VMoE; nothing in it changes on an error. A `VideoVMoE` takes an image model's weights, too, inflated as
            `weights.tubelets.for_video` does.
        state: names as ours.
        source: where the state comes from, for errors.
        drop_head: whether to keep the model's own head even where the number of classes is the same.
        grid: rows and columns of patches that the state has positions for; None if that is not known.

    Raises:
        ValueError: if a parameter is missing, unknown, or of another shape.
    """
    own = model.state_dict()
    had_pre_logits = "pre_logits.0.weight" in state
    head, kernel = state.get("head.weight"), state.get("patch_embed.proj.weight")
    dims = (4, own["patch_embed.proj.weight"].dim())
    if kernel is not None and (kernel.dim() not in dims or kernel.numel() == 0):
        raise ValueError(f"{source}: patch_embed.proj.weight must be (D, C, P, P), got {tuple(kernel.shape)}")
    state = checkpoint_filter_fn(dict(state), model, grid or known_grid(state, model))
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None:
        state["patch_embed.proj.weight"] = adapt_channels(kernel, own["patch_embed.proj.weight"].shape[1])
    if model.fixed_pos_embed:
        state["pos_embed"] = own["pos_embed"]
    same_head = not drop_head and head is not None and head.shape[0] == model.num_classes
    wrong = []
    if not same_head:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state |= {name: value for name, value in own.items() if name.startswith("head.")}
    elif had_pre_logits and "pre_logits.0.weight" not in own:
        wrong.append(
            "pre_logits.0.weight is not in the model, but its head is (create it with representation_size=True)"
        )
    own = as_loaded(own, state)
    missing = sorted(name for name in own.keys() - state.keys() if not _may_lack(state, name))
    wrong += [f"{name} is missing" for name in missing]
    wrong += [f"{name} is not in the model" for name in sorted(state.keys() - own.keys())]
    wrong += [
        f"{name} must be {tuple(own[name].shape)}, got {tuple(state[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if wrong:
        routers = [name for name in own if name.endswith(".router.weight")]
        dense = routers and not any(name in state for name in routers)
        hint = "; it has no router: of a dense model, vmoe_torch.upcycle makes a V-MoE" if dense else ""
        raise ValueError(f"{source} must fit the model: " + "; ".join(wrong[:8]) + hint)
    model.load_state_dict(state)


def _may_lack(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether a model loads its thresholds without this one: weights of top experts have none."""
    router, _, last = name.rpartition(".")
    return last == "thresholds" and f"{router}.weight" in state
