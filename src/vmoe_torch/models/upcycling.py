"""Sparse upcycling (arXiv 2212.05055): some MLPs of a dense model become E copies of themselves behind a router."""

import copy
import math
import os
from functools import partial
from typing import Any, Unpack

import timm
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vmoe_torch.layers import ExpertLinear, MoeMlp, SizedLinear
from vmoe_torch.layers.options import ExpertOptions
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.models.blocks import parse_moe_layers
from vmoe_torch.models.options import MoeLayers
from vmoe_torch.weights.sources import is_weights, read_weights


def upcycle(
    model: str | os.PathLike | nn.Module,
    moe_layers: MoeLayers = "every2",
    num_experts: int = 8,
    *,
    expert_noise: float = 0.0,
    renormalize_gates: bool = False,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
    **moe: Unpack[ExpertOptions],
) -> nn.Module:
    """A sparse model whose experts all begin as the dense model's MLPs.

    Gates are softmax values, so a token's K gates sum to less than 1 and the new model's output differs from the
    dense one's. With renormalize_gates they sum to 1: while capacity drops nothing, expert_noise is 0 and all experts
    are as wide as the MLP, both models compute the same, whatever the routers say.

    Narrower experts (`expert_hidden`) are nested: each has the first H_e hidden units of the MLP, sorted by the norm of
    their weights in times that of their weights out, largest first.

    Args:
        model: a model: a VisionTransformer or another one with `blocks` whose `mlp` is timm's Mlp, which is copied, not
            changed; a timm model's name; or the weights of one, as `vmoe_torch.checkpoints.read_weights` reads them.
        moe_layers: "everyN", "lastN" or block numbers, as in `VMoE`.
        num_experts: E.
        expert_noise: standard deviation of Gaussian noise on every expert's weights, as a multiple of the standard
            deviation of the dense weight.
        renormalize_gates: whether the K gates of a token are scaled to sum to 1.
        pretrained: whether the named model gets its pretrained weights.
        model_args: what else `timm.create_model` gets for the named model.
        **moe: what else `MoeMlp` takes, e.g. num_selected_experts, capacity_factor, batch_priority, group_size.

    Returns:
        A copy of the dense model with a `MoeMlp` in the chosen blocks, in the same mode, dtype and on the same device;
        routers are random.

    Raises:
        ValueError: if the model has no blocks, a chosen block's MLP is of a kind that experts are not, or the slots of
            a soft router are left to the tokens of an image and the model does not say how many there are.
    """
    if not 0 <= expert_noise < math.inf:
        raise ValueError(f"expert_noise must be finite and at least 0, got {expert_noise}")
    if isinstance(model, str) and (model.startswith("hf-hub:") or (timm.is_model(model) and not is_weights(model))):
        model = timm.create_model(model, pretrained=pretrained, **(model_args or {}))
    elif pretrained or model_args:
        got = f"a {type(model).__name__}" if isinstance(model, nn.Module) else model
        raise ValueError(f"pretrained and model_args must go with a model's name, got {got}")
    elif not isinstance(model, nn.Module):
        model, _ = open_weights(read_weights(model))
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise ValueError(f"model must have blocks with an mlp each, as a VisionTransformer, got {type(model).__name__}")
    for index, block in enumerate(blocks):
        if not hasattr(block, "mlp"):
            kinds = f"{type(model).__name__} with {type(block).__name__}"
            raise ValueError(f"model must have blocks with an mlp each, got a {kinds} as block {index}")
    chosen = parse_moe_layers(moe_layers, len(blocks))
    for index in chosen:
        _check_mlp(f"blocks.{index}.mlp", blocks[index].mlp)
    model = copy.deepcopy(model)
    for index in chosen:
        block = model.blocks[index]
        options = {"num_experts": num_experts, "renormalize_gates": renormalize_gates, **moe}
        block.mlp = _experts(block.mlp, expert_noise, options)
        _fit(block.mlp, model)
    # Experts' biases are 2-D, so that timm would take them for weights. A partial is copied and pickled as any value.
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    parameters = (name for name, _ in model.named_parameters() if name.endswith(".bias"))
    experts = tuple(f"blocks.{index}.mlp.{layer}." for index in chosen for layer in ("fc1", "fc2"))
    spared |= {name for name in parameters if name.startswith(experts)}
    spared |= {f"blocks.{index}.mlp.router.mu" for index in chosen}
    model.no_weight_decay = partial(set, sorted(spared))
    return model


def _check_mlp(name: str, mlp: nn.Module) -> None:
    # Its subclasses compute something else.
    if type(mlp) is not Mlp:
        raise ValueError(f"{name} must be timm's Mlp to become experts, got {type(mlp).__name__}")
    if not isinstance(mlp.norm, nn.Identity):
        raise ValueError(f"{name} must have no norm inside to become experts, got {type(mlp.norm).__name__}")
    if not isinstance(mlp.fc1, nn.Linear) or not isinstance(mlp.fc2, nn.Linear):
        raise ValueError(f"{name} must be made of linear layers to become experts, got {type(mlp.fc1).__name__}")
    if (mlp.fc1.bias is None) != (mlp.fc2.bias is None):
        raise ValueError(f"{name} must have both biases or none to become experts, got one")


@torch.no_grad()
def _experts(mlp: Mlp, noise: float, options: dict[str, Any]) -> MoeMlp:
    act = "gelu_tanh" if getattr(mlp.act, "approximate", "none") == "tanh" else type(mlp.act)
    experts = MoeMlp(
        mlp.fc1.in_features,
        mlp.fc1.out_features,
        mlp.fc2.out_features,
        act_layer=act,
        bias=mlp.fc1.bias is not None,
        drop=mlp.drop1.p,
        device=mlp.fc1.weight.device,
        dtype=mlp.fc1.weight.dtype,
        **options,
    )
    if experts.shared_expert is not None:
        # It begins without a say.
        for parameter in experts.shared_expert.fc2.parameters():
            parameter.zero_()
    if experts.sizes.groups[0].hidden > mlp.fc1.out_features:
        raise ValueError(
            f"expert_hidden must be at most the dense MLP's {mlp.fc1.out_features}, "
            f"got {experts.sizes.groups[0].hidden}"
        )
    units = torch.arange(mlp.fc1.out_features, device=mlp.fc1.weight.device)
    if set(experts.expert_hidden) != {mlp.fc1.out_features}:
        importance = mlp.fc1.weight.float().norm(dim=1) * mlp.fc2.weight.float().norm(dim=0)
        units = importance.argsort(descending=True, stable=True)
    first, second = (noise * fc.weight.std().item() if noise > 0 else 0.0 for fc in (mlp.fc1, mlp.fc2))
    for fc1, fc2 in zip(experts.fc1.linears(), experts.fc2.linears()):
        own = units[: fc1.weight.shape[1]]
        _copy_linear(mlp.fc1.weight[own], None if mlp.fc1.bias is None else mlp.fc1.bias[own], fc1, first)
        _copy_linear(mlp.fc2.weight[:, own], mlp.fc2.bias, fc2, second)
    return experts.train(mlp.training)


def _fit(experts: MoeMlp, model: nn.Module) -> None:
    """Makes what depends on the tokens of an image, as long as the model says how many there are."""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is not None:
        experts.own_router().fit(patches + getattr(model, "num_prefix_tokens", 0))
    elif any(is_lazy(parameter) for parameter in experts.router.parameters()):
        raise ValueError(
            "slots_per_expert must be at least 1 with router='soft' for a model that does not say how many patches an "
            f"image has, got None for {type(model).__name__}"
        )


def _copy_linear(weight: Tensor, bias: Tensor | None, sparse: ExpertLinear, std: float) -> None:
    """With noise of this standard deviation on the weights."""
    sparse.weight.copy_(weight.expand_as(sparse.weight))
    if std > 0:
        sparse.weight.add_(torch.randn_like(sparse.weight), alpha=std)
    if bias is not None:
        sparse.bias.copy_(bias.expand_as(sparse.bias))


def upcycle_optimizer(
    dense_optimizer: torch.optim.Optimizer,
    dense: nn.Module,
    sparse_optimizer: torch.optim.Optimizer,
    sparse: nn.Module,
) -> None:
    """Copies the moments of a dense model's optimizer to that of the upcycled one; every expert gets a copy.

    Routers have no past: their state begins at their first step.

    Args:
        dense_optimizer: of the dense model.
        dense: the model that was upcycled.
        sparse_optimizer: of the same kind, over the upcycled model's parameters; its state is replaced.
        sparse: what `upcycle` returned.

    Raises:
        ValueError: if the optimizers are of two kinds, experts are of several sizes, a parameter's shape is neither the
            dense one nor E copies of it, or what is known of one that is copied is not of its shape (as in Adafactor);
            then nothing has changed.
    """
    if type(sparse_optimizer) is not type(dense_optimizer):
        kinds = (type(dense_optimizer).__name__, type(sparse_optimizer).__name__)
        raise ValueError(f"both optimizers must be of one kind, got {kinds[0]} and {kinds[1]}")
    if any(isinstance(module, SizedLinear) for module in sparse.modules()):
        raise ValueError("experts must be of one size to take over an optimizer's moments, got several")
    own = dict(dense.named_parameters())
    state = {}
    for name, parameter in sparse.named_parameters():
        before = own.get(name)
        if before is None:
            continue
        if parameter.shape != before.shape and parameter.shape[1:] != before.shape:
            raise ValueError(
                f"{name} must be {tuple(before.shape)} or a number of them, as upcycled, got {tuple(parameter.shape)}"
            )
        if before in dense_optimizer.state:
            past = dense_optimizer.state[before]
            state[parameter] = {
                key: _copied(f"{key} of {name}", value, before, parameter) for key, value in past.items()
            }
    for parameter in sparse.parameters():
        sparse_optimizer.state.pop(parameter, None)
    sparse_optimizer.state.update(state)


def _copied(name: str, value, before: Tensor, after: Tensor):
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.dim() == 0 or before.shape == after.shape:
        return value.clone()
    if value.shape != before.shape:
        raise ValueError(f"{name} must be {tuple(before.shape)} to be copied to every expert, got {tuple(value.shape)}")
    return value.expand_as(after).clone()
