"""Nested dataclasses changed by nested dicts, from JSON or from what was typed as `key=value`."""

import difflib
import json
import math
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from vmoe_torch.train.rules import meant

# What keys are called elsewhere and do not look like.
OTHER_NAMES = {"learning_rate": "lr", "amp": "precision", "dtype": "precision"}
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Text(str):
    """A value as typed on the command line, to be parsed by the type of its key."""

    __slots__ = ()


def read_object(path: Path | str) -> dict[str, Any]:
    """The JSON object in a configuration's file.

    Raises:
        ValueError: if the file cannot be read, holds something else, or has a key twice.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config file {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold a JSON object, got {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; JSON itself would take the last of two values."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"every key must be there once, got {', '.join(twice)} twice")
    return dict(pairs)


def changed(config: Any, values: Any, path: str = "", root: type | None = None) -> Any:
    """A dataclass with nested values changed.

    Args:
        config: the dataclass; its fields may be dataclasses.
        values: nested dict of what changes; a `Text` is parsed by the type of its key.
        path: of the dataclass in the whole configuration, for messages.
        root: type of the whole configuration, whose keys messages suggest; None for this one's.

    Raises:
        ValueError: if a key is unknown or a value has the wrong type.
    """
    root = root or type(config)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be changed by its own keys, got {values!r}")
    types_of = get_type_hints(type(config))
    names = [f.name for f in fields(config)]
    changes = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else name
        if name not in names:
            raise ValueError(f"unknown config key {key!r}{_near(key, type(config), path, root)}")
        current = getattr(config, name)
        if is_dataclass(current):
            changes[name] = changed(current, value, key, root)
        elif isinstance(current, dict):
            changes[name] = _merged(current, value, key)
        else:
            changes[name] = _typed(value, types_of[name], key)
    return replace(config, **changes)


def _near(key: str, cls: type, path: str, root: type) -> str:
    """The known keys that look like this one as a whole or in their last part, or those beside it."""
    known = list(_paths(root, ""))
    by_last: dict[str, list[str]] = {}
    for known_key in known:
        by_last.setdefault(known_key.rpartition(".")[2], []).append(known_key)
    last = key.rpartition(".")[2]
    close = [
        *by_last.get(OTHER_NAMES.get(last, last), ()),
        *difflib.get_close_matches(key, known, n=3),
        *(each for name in difflib.get_close_matches(last, by_last, n=3) for each in by_last[name]),
    ]
    close = list(dict.fromkeys(close))[:3]
    beside = [f"{path}.{f.name}" if path else f.name for f in fields(cls)]
    return meant(close) or f"; known are {', '.join(beside)}"


def _paths(cls: type, path: str) -> Iterator[str]:
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind):
            yield from _paths(kind, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _merged(current: dict, value: Any, key: str) -> dict:
    """A free dict: keys are added and replaced one by one, also in dicts inside."""
    if isinstance(value, Text):
        value = _from_json(value)
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a JSON object or be changed by {key}.NAME=VALUE, got {value!r}")
    merged = dict(current)
    for name, item in value.items():
        if isinstance(item, dict):
            item = _merged(merged[name] if isinstance(merged.get(name), dict) else {}, item, f"{key}.{name}")
        merged[name] = _from_json(item) if isinstance(item, Text) else item
    return merged


def _from_json(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        words = {"True": True, "False": False, "None": None}
        return words.get(str(text), str(text))


def _typed(value: Any, kind: Any, key: str) -> Any:
    """A value of this type, from JSON or from text."""
    if get_origin(kind) in (types.UnionType, Union):
        if value is None or (isinstance(value, Text) and value.lower() in ("none", "null")):
            return None
        (kind,) = (option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is tuple:
        return _typed_tuple(value, get_args(kind), key)
    if kind is str:
        if isinstance(value, str):
            return str(value)
        raise ValueError(f"{key} must be a string, got {value!r}")
    if isinstance(value, Text):
        value = typed_text(value, {kind})
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        return float(value)
    if kind is int and is_number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    raise ValueError(f"{key} must be of type {kind.__name__}, got {value!r}")


def typed_text(text: str, kinds: set[type]) -> Any:
    """What was typed, as one of some types where it reads as one: a number, or a word for true, false or null."""
    word = text.strip().lower()
    if bool in kinds and word in WORDS:
        return WORDS[word]
    if type(None) in kinds and word in ("none", "null"):
        return None
    if kinds & {int, float}:
        try:
            # "1." and "inf" are no JSON, and a large whole number is no float.
            return int(text) if int in kinds and text.strip().lstrip("+-").isdecimal() else float(text)
        except ValueError:
            pass
    value = _from_json(text)
    return value if not isinstance(value, str) else str(text)


def _typed_tuple(value: Any, kinds: tuple, key: str) -> tuple:
    if isinstance(value, Text):
        # As in Python, nothing may come after the last comma.
        inside = value.strip("()[] ").removesuffix(",")
        value = [Text(part.strip()) for part in inside.split(",")] if inside else []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} must be a list of numbers, got {value!r}")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(value) != len(kinds):
        raise ValueError(f"{key} must have {len(kinds)} values, got {len(value)}")
    return tuple(_typed(item, kind, key) for item, kind in zip(value, kinds))
