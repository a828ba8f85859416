"""Rules that a value keeps, declared beside what they are for, and told in the words of the error that they cause."""

import difflib
import math
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, get_type_hints


class Rule(Protocol):
    """What a value must be; `str(rule)` goes after "must be"."""

    def holds(self, value: Any) -> bool:
        """Whether a value keeps it."""


@dataclass(frozen=True)
class Number:
    """A number between bounds, which belong to it unless they are open."""

    low: float = -math.inf
    """Least value."""
    high: float = math.inf
    """Largest value."""
    open_low: bool = False
    """Whether `low` itself is refused."""
    open_high: bool = False
    """Whether `high` itself is refused."""
    finite: bool = True
    """Whether infinities and NaN are refused."""
    or_null: bool = False
    """Whether null has a meaning of its own, which an error should offer."""

    def holds(self, value: float) -> bool:
        if self.finite and not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            text = f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        elif self.low > -math.inf:
            text = f"{'above' if self.open_low else 'at least'} {self.low:g}{' and finite' if self.finite else ''}"
        else:
            text = "finite"
        return f"{text} or null" if self.or_null else text


def count(low: int) -> Number:
    """A whole number from here on."""
    return Number(low, finite=False)


@dataclass(frozen=True)
class Each:
    """Several values that keep one rule, in ascending order where that is asked for."""

    rule: Rule
    """What each of them keeps."""
    ascending: bool = False
    """Whether the smaller must come first."""

    def holds(self, value: tuple) -> bool:
        ordered = not self.ascending or tuple(sorted(value)) == value
        return len(value) > 0 and all(map(self.rule.holds, value)) and ordered

    def __str__(self) -> str:
        return f"numbers that are {self.rule}{', the smaller one first' if self.ascending else ''}"


@dataclass(frozen=True)
class OneOf:
    """One of some words or numbers."""

    choices: tuple[Any, ...]
    """All that are allowed."""

    def holds(self, value: Any) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}"


@dataclass(frozen=True)
class Matches:
    """Text that a pattern describes whole."""

    pattern: str
    """Regular expression."""
    words: str
    """What an error says of it."""

    def holds(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


# A name, a path: something.
SOMETHING = Matches(r"(?s).*\S.*", "text that is not empty")
# The accelerators that the kernels and the commands know.
DEVICE = Matches(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")


def check(name: str, rule: Rule, value: Any) -> None:
    """Raises ValueError, naming what it is, if a value breaks a rule."""
    if not rule.holds(value):
        raise ValueError(f"{name} must be {rule}, got {_shown(value)}")


def near(name: str, known: Iterable[str], most: int = 3) -> str:
    """The end of an error: which of the known names may have been meant, or "" where none looks like this one."""
    return meant(difflib.get_close_matches(name, list(known), n=most))


def meant(names: list[str]) -> str:
    """The end of an error that asks for these names, or "" where there are none."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else repr(value)


def declared(cls: type, path: str = "") -> Iterator[tuple[str, Any, Rule | None]]:
    """Path, type and rule of every field of nested dataclasses; fields that are annotated with none have None."""
    for name, kind in get_type_hints(cls, include_extras=True).items():
        if is_dataclass(kind):
            yield from declared(kind, f"{path}{name}.")
            continue
        rule = None
        if get_origin(kind) is Annotated:
            kind, rule = get_args(kind)
        yield f"{path}{name}", kind, rule


def check_declared(config: Any) -> None:
    """Raises ValueError if a field of nested dataclasses breaks its rule; null breaks none where it is allowed."""
    for path, kind, rule in declared(type(config)):
        value = config
        for name in path.split("."):
            value = getattr(value, name)
        optional = get_origin(kind) in (types.UnionType, Union) and type(None) in get_args(kind)
        if rule is not None and not (optional and value is None):
            check(path, rule, value)
