"""Arguments of a model's constructor, as a configuration names them: known by name, and typed by its own signature."""

import difflib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vmoe_torch.data.typefaces import LEAST_SIDE, checked_characters
from vmoe_torch.models.vmoe import VMoE
from vmoe_torch.train.overrides import typed_text
from vmoe_torch.train.rules import SOMETHING, Number, OneOf, Rule, check, count, near

# What timm's factories take for themselves; what they decide by (`features_only`) makes something else than a model.
FACTORY = {"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable", "exportable"}
FACTORY |= {"no_jit", "pretrained_strict", "pretrained_custom_load"}
SHARE = Number(0, 1, open_high=True)
# Values that fail far from where they are given, or never.
RULES: dict[str, Rule] = {
    # Images are read as RGB or as grey ones.
    "in_chans": OneOf((1, 3)),
    # timm's word for none; then there is nothing to classify by.
    "global_pool": SOMETHING,
    "mlp_ratio": Number(0, open_low=True),
    "init_values": Number(),
    "head_bias_init": Number(),
    **dict.fromkeys(("patch_size", "img_size", "depth", "embed_dim", "num_heads", "num_classes"), count(1)),
    **dict.fromkeys(("reg_tokens", "representation_size"), count(0)),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate"), SHARE),
    **dict.fromkeys(("attn_drop_rate", "drop_path_rate", "expert_drop"), SHARE),
}


def model_arguments(model_name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `model.kwargs` says, in the types that the constructor of a timm model wants.

    Args:
        model_name: of a model that timm has.
        values: by name; a word of the command line may be text where the constructor wants something else.

    Raises:
        ValueError: naming the key, if there is no such argument, or the value has another type or is out of its range.
    """
    parameters, takes_all = _parameters(_model_class(model_name)) if values else ({}, False)
    known = parameters.keys() | FACTORY
    return _typed_all("model.kwargs", values, parameters, known, takes_all, model_name)


def upcycle_arguments(model_name: str, upcycle: Callable, layer: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `model.upcycle` says, in the types that `upcycle` and the layer it makes want.

    Raises:
        ValueError: as `model_arguments`.
    """
    own, layers = _of(upcycle), _of(layer.__init__)
    # The model is there already, and gives the layer its widths.
    for name in ("model", "pretrained", "model_args"):
        del own[name]
    parameters = {**layers, **own}
    return _typed_all("model.upcycle", values, parameters, parameters.keys(), False, model_name)


def data_arguments(data: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `data.kwargs` says, in the types that `Typefaces` wants.

    Raises:
        ValueError: as `model_arguments`.
    """
    parameters = {"side": int, "characters": str | list[str] | tuple[str, ...] | None}
    typed = _typed_all("data.kwargs", values, parameters, parameters.keys(), False, data)
    if "side" in typed:
        check("data.kwargs.side", count(LEAST_SIDE), typed["side"])
    if typed.get("characters") is not None:
        typed["characters"] = checked_characters(typed["characters"], "data.kwargs.characters")
    return typed


def suggestions(name: str) -> list[str]:
    """Arguments of V-MoE that look like a key that is unknown, as "model.kwargs.num_experts"."""
    alike = difflib.get_close_matches(name, _parameters(VMoE)[0], n=2, cutoff=0.75)
    return [f"model.kwargs.{each}" for each in alike]


def _typed_all(section, values, parameters, known, takes_all, owner) -> dict[str, Any]:
    typed = {}
    for name, value in values.items():
        key = f"{section}.{name}"
        if name not in known and not takes_all:
            hint = near(name, sorted(known)) or f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{section} of {owner}: {key} is an unexpected keyword argument {name!r}{hint}")
        kind = parameters.get(name, inspect.Parameter.empty)
        typed[name] = _typed(key, value, kind)
        # A size may be a pair.
        for item in typed[name] if isinstance(typed[name], list | tuple) else [typed[name]]:
            if name in RULES and isinstance(item, str if RULES[name] is SOMETHING else int | float):
                check(key, RULES[name], item)
    return typed


def _model_class(name: str) -> type:
    """The class of a timm model, known by where its function stands, else by building one without memory."""
    module = sys.modules[timm.model_entrypoint(name).__module__]
    if module is sys.modules[VMoE.__module__]:
        return VMoE
    if module is sys.modules[VisionTransformer.__module__]:
        return VisionTransformer
    with torch.device("meta"):
        return type(timm.create_model(name))


def _parameters(cls: type) -> tuple[dict[str, Any], bool]:
    """The types of all arguments of a class, by name, and whether it takes others, too."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        found = {**_of(base.__init__), **found}
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(base.__init__).parameters.values()):
            # What stands between is set by the class itself.
            return found, False
    return found, True


def _of(function: Callable) -> dict[str, Any]:
    """Types of named arguments; where there is none, the default's, if that says it."""
    hints = typing.get_type_hints(function)
    empty = inspect.Parameter.empty
    return {
        name: hints.get(name, empty)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
    }


def _typed(key: str, value: Any, kind: Any) -> Any:
    """A value as one of the types that an annotation allows."""
    options = _options(kind)
    if not options or (value is None and type(None) in options):
        return value
    wanted = {option for option in options if isinstance(option, type)}
    literals = [option for option in options if not isinstance(option, type)]
    if isinstance(value, str):
        if value in literals or str in wanted:
            return value
        value = typed_text(value, wanted)
    if isinstance(value, bool):
        fits = bool in wanted
    elif isinstance(value, int | float):
        if int in wanted and value == value // 1:
            return int(value)
        fits = float in wanted
        value = float(value) if fits else value
    elif isinstance(value, list | tuple):
        fits = bool(wanted & {list, tuple})
    else:
        fits = isinstance(value, tuple(wanted)) if wanted else False
    if not fits and value not in literals:
        # Dicts of one value per layer are what saved models hold; nobody types them.
        told = wanted - {dict} or wanted
        names = sorted({"null" if option is type(None) else option.__name__ for option in told})
        raise ValueError(f"{key} must be {' or '.join([*names, *map(repr, literals)])}, got {value!r}")
    return value


def _options(kind: Any) -> list[Any]:
    """The types and literals that an annotation allows; none where anything goes."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        parts = [_options(option) for option in get_args(kind)]
        return [option for part in parts for option in part] if all(parts) else []
    if origin is Literal:
        return list(get_args(kind))
    if origin in (list, tuple, dict):
        return [origin]
    # Layers go by name or as what they are, which no command line can say.
    simple = (int, float, bool, str, type(None), dict)
    return [kind] if kind in simple else []
