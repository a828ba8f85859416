"""The model that weights are of: said by them or by what stands beside them, or read off their shapes."""

import math
import re
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import is_model_in_modules
from torch import Tensor, nn

from vmoe_torch.layers.choice import description_of, metadata_of, restore_routing
from vmoe_torch.layers.int8_experts import as_loaded
from vmoe_torch.models.vmoe import VMoE
from vmoe_torch.weights.adapt import load_adapted
from vmoe_torch.weights.conversion import Origin, weights_of
from vmoe_torch.weights.grid import grid_of, square_grid
from vmoe_torch.weights.names import join_members
from vmoe_torch.weights.sources import Weights

# Of our models, as timm lists them.
MODULES = ("vmoe", "ensemble", "soft_moe", "video")


def open_weights(weights: Weights) -> tuple[nn.Module, str]:
    """The model that weights are of, in eval mode or not as timm made it, with the routing that was chosen for them.

    Args:
        weights: of `read_weights`.

    Returns:
        The model, and in a few words what told it.

    Raises:
        ValueError: if it is not known what they are of, or they do not fit that.
    """
    state, source, described = weights_of(weights.state), weights.source, description_of(weights.state)
    if weights.name is not None:
        name, arguments, told = weights.name, shape_arguments(weights.name, state), f"{weights.name}, as named"
    elif source.startswith("hf-hub:"):
        name, arguments, told = source, {}, f"{source}, as config.json says"
    elif weights.hub is not None:
        name, arguments = f"local-dir:{weights.hub.folder}", {}
        told = f"{weights.hub.config['architecture']}, as config.json says"
    elif described is not None:
        name, arguments = described["architecture"], described["model_args"]
        told = f"{name}, as the file says"
    elif weights.run is not None:
        config = weights.run["config"]["model"]
        name, arguments = config["name"], config["kwargs"] | {"num_classes": len(weights.run["class_names"])}
        told = "vmoe train's configuration"
    elif weights.origin is not None:
        name = "vmoe_s32" if weights.origin.ensemble_size == 1 else "eee_s32_last2_e8"
        try:
            arguments = model_arguments(join_members(state), weights.origin)
        except KeyError as error:
            raise ValueError(f"{source} must hold the weights of a V-MoE, missing {error}") from None
        told = "a checkpoint of the original"
    elif weights.timm is not None:
        name = weights.timm.name
        given = weights.timm.arguments()
        arguments = given | shape_arguments(name, state)
        if "router" in given:
            # One of somebody's own may look like one of ours.
            arguments["router"] = given["router"]
        if "slots_per_expert" in arguments:
            # It said how many, and now they are there.
            arguments.pop("capacity_factor", None)
        told = f"{name}, as timm's train.py was told"
    else:
        name = identified(state, source)
        arguments, told = shape_arguments(name, state), f"{name}, by the shapes of its weights"
    model = created(name, arguments, source)
    if isinstance(model, VMoE):
        load_adapted(model, state, source, grid=weights.grid)
    else:
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{source} must fit {name}: {' '.join(str(error).split())}") from None
    restore_routing(model, metadata_of(weights.state), source)
    return model, told


def created(name: str, arguments: Mapping[str, Any], source: str, **more) -> nn.Module:
    """`timm.create_model`, its errors named."""
    try:
        return timm.create_model(name, **arguments, **more)
    # What timm and its models raise at a wrong argument is of many kinds.
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise ValueError(f"{source} must be of a model that can be made, got {name}: {error}") from error


def shape_arguments(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a timm model that the shapes of its weights tell: classes, channels, and of ours also experts,
    which layers have them, and the size of the images."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    found = {}
    for key, module, dim in (("num_classes", cfg and cfg.classifier, 0), ("in_chans", cfg and cfg.first_conv, 1)):
        weight = state.get(f"{module}.weight") if isinstance(module, str) else None
        if weight is not None and weight.dim() > 1:
            found[key] = weight.shape[dim]
    if not is_ours(name):
        return found
    joined = join_members(
        {key: value for key, value in state.items() if key.endswith((".router.weight", ".router.mu"))}
    )
    routers = {int(key.split(".")[1]): value for key, value in joined.items() if key.endswith(".mlp.router.weight")}
    if "head.weight" not in state:
        found["num_classes"] = 0
    slots = {int(key.split(".")[1]): value for key, value in joined.items() if key.endswith(".mlp.router.mu")}
    if routers:
        found |= {"moe_layers": tuple(sorted(routers)), "num_experts": _experts(routers)}
        if any(key.endswith(".router.thresholds") for key in state):
            found["router"] = "threshold"
    elif slots:
        _, experts, per_expert = next(iter(slots.values())).shape
        found |= {"moe_layers": tuple(sorted(slots)), "num_experts": experts}
        found |= {"router": "soft", "slots_per_expert": per_expert}
    if routers or slots:
        block, experts = found["moe_layers"][0], found["num_experts"]
        widths = _expert_widths(state, block, experts[f"blocks.{block}.mlp"] if isinstance(experts, dict) else experts)
        # Layers of different numbers have experts of one size.
        if widths is not None and not (isinstance(experts, dict) and isinstance(widths, tuple)):
            found["expert_hidden"] = widths
    shared = [value for key, value in state.items() if key.endswith(".shared_expert.fc1.weight")]
    if shared:
        found["shared_expert_hidden"] = len(shared[0])
    if "pre_logits.0.weight" in state:
        found["representation_size"] = len(state["pre_logits.0.weight"])
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.dim() == 4:
        grid = (cfg and grid_of(cfg.input_size[1:], state)) or square_grid(state)
        if grid is not None:
            found["img_size"] = (grid[0] * kernel.shape[2], grid[1] * kernel.shape[3])
    return found


def _expert_widths(state: Mapping[str, Tensor], block: int, num_experts: int) -> int | tuple[int, ...] | None:
    """`expert_hidden` as the names and shapes of a block's weights tell it; None where experts are as wide as MLPs."""
    weight = re.compile(rf"blocks\.{block}\.mlp\.(?:members\.(\d+)\.)?fc1\.(?:experts_([\dto_]+)\.)?weight")
    found = [(match, value) for name, value in state.items() if (match := weight.fullmatch(name)) and value.dim() == 3]
    members = 1 + max((int(match[1] or 0) for match, _ in found), default=0)
    own, widths = num_experts // members, [0] * num_experts
    for match, value in found:
        for run in (match[2] or f"0to{own - 1}").split("_"):
            first, _, last = run.partition("to")
            for expert in range(int(first), int(last or first) + 1):
                widths[int(match[1] or 0) * own + expert] = value.shape[1]
    if len(set(widths)) > 1:
        return tuple(widths)
    mlps = [value for name, value in state.items() if re.fullmatch(r"blocks\.\d+\.mlp\.fc1\.weight", name)]
    alike = {len(value) for value in mlps if value.dim() == 2} == {widths[0]}
    return None if not found or alike else widths[0]


def is_ours(name: str) -> bool:
    """Whether a timm model's name is of this package."""
    return any(is_model_in_modules(name.partition(".")[0], [module]) for module in MODULES)


def identified(state: Mapping[str, Tensor], source: str) -> str:
    """The one model of ours with weights of these shapes.

    Raises:
        ValueError: if there is none, or several.
    """
    # One with this router by itself comes before those that can be given it.
    fitting = _fitting(state, "router")
    if not fitting and any(name.endswith((".router.mu", ".router.thresholds")) for name in state):
        fitting = _fitting(state)
    if len(fitting) == 1:
        return fitting[0]
    got = f"shapes of {' or '.join(fitting)}" if fitting else "shapes of no model of this package"
    raise ValueError(
        f"{source} must say what model it is of, by args.yaml of timm's train.py or config.json of save_for_hf beside "
        f"it, or be given as NAME={source} with the name of a timm model; got {got}"
    )


def _fitting(state: Mapping[str, Tensor], *left_out: str) -> list[str]:
    """Names of the models with weights of these shapes, given all that those tell but what is left out."""
    shapes = {name: value.shape for name, value in state.items()}
    fitting = []
    for name in (name for module in MODULES for name in timm.list_models(module=module)):
        try:
            arguments = {key: value for key, value in shape_arguments(name, state).items() if key not in left_out}
            model = timm.create_model(name, device="meta", **arguments)
        # Shapes of something else make arguments that no model takes.
        except (TypeError, ValueError, RuntimeError, AssertionError):
            continue
        if {key: value.shape for key, value in as_loaded(model.state_dict(), state).items()} == shapes:
            fitting.append(name)
    return fitting


def _experts(routers: Mapping[int, Tensor]) -> int | dict[str, int]:
    """E, or that of each layer where they differ, of the routers by their blocks."""
    numbers = {f"blocks.{block}.mlp": len(weight) for block, weight in routers.items()}
    return numbers if len(set(numbers.values())) > 1 else next(iter(numbers.values()))


def model_arguments(state: Mapping[str, Tensor], origin: Origin) -> dict[str, Any]:
    """The arguments of a `VMoE` or `VMoEEnsemble` with these weights.

    Args:
        state: names as ours, an ensemble's routers joined.
        origin: what the shapes do not say.

    Raises:
        KeyError: if a weight that every model has is missing.
    """
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    routers = {int(name.split(".")[1]): value for name, value in state.items() if name.endswith(".mlp.router.weight")}
    class_token = "cls_token" in state
    arguments = {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "depth": 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1),
        "num_heads": origin.num_heads,
        # A hair more, as timm rounds down what may come out just below.
        "mlp_ratio": math.nextafter(state["blocks.0.mlp.fc1.weight"].shape[-2] / width, math.inf),
        "class_token": class_token,
        "global_pool": "map" if "attn_pool.latent" in state else "token" if class_token else "avg",
        "representation_size": len(state["pre_logits.0.weight"]) if "pre_logits.0.weight" in state else 0,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "moe_layers": tuple(sorted(routers)),
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    if routers:
        arguments["num_experts"] = _experts(routers)
    if "pos_embed" in state:
        grid = square_grid(state)
        if grid is None:
            raise ValueError(f"pos_embed must hold a square grid, got {state['pos_embed'].shape[1]} positions")
        arguments["img_size"] = patch * grid[0]
    else:
        # The original stores no positions that it can compute.
        arguments["pos_embed"] = "sincos2d"
    if origin.ensemble_size > 1:
        arguments["ensemble_size"] = origin.ensemble_size
    return arguments
