"""Every key's range: declared beside the field, and refused outside with the key, the rule and the value."""

import math
import re
import types
from dataclasses import replace
from typing import Union, get_args, get_origin

import pytest

from vmoe_torch.train import Config
from vmoe_torch.train.idle_keys import value_at
from vmoe_torch.train.rules import Each, Matches, Number, OneOf, check, count, declared, near

FIELDS = {path: (kind, rule) for path, kind, rule in declared(Config)}
BASE = Config().override("data.name=fashion_mnist")


def simple_types(kind):
    """The types that an annotation is made of."""
    inside = get_args(kind) if get_origin(kind) in (types.UnionType, Union, tuple) else ()
    return {found for part in inside for found in simple_types(part)} | ({kind} if not inside else set())


def with_value(key, value):
    """A configuration with a value that no parser has seen."""
    section, name = key.split(".")
    return replace(BASE, **{section: replace(getattr(BASE, section), **{name: value})})


def outside(rule, whole):
    """Numbers that a rule refuses."""
    step = 1 if whole else 1e-6
    found = [math.nan, -math.inf] if not whole else []
    if rule.finite and not whole:
        found.append(math.inf)
    if rule.low > -math.inf:
        found.append(rule.low if rule.open_low else rule.low - step)
    if rule.high < math.inf:
        found.append(rule.high if rule.open_high else rule.high + step)
    return found


NUMERIC = [key for key, (kind, _) in FIELDS.items() if simple_types(kind) & {int, float}]
TEXTS = [key for key, (kind, _) in FIELDS.items() if str in simple_types(kind)]


@pytest.mark.parametrize("key", NUMERIC)
def test_every_number_has_a_range_and_keeps_it(key):
    kind, rule = FIELDS[key]
    inner = rule.rule if isinstance(rule, Each) else rule
    assert isinstance(inner, Number), f"{key} declares no range"
    values = outside(inner, whole=float not in simple_types(kind))
    assert values
    for value in values:
        value = (value, value) if isinstance(rule, Each) else value
        with pytest.raises(ValueError, match=f"^{re.escape(f'{key} must be {rule}, got ')}"):
            with_value(key, value).check()


@pytest.mark.parametrize("key", TEXTS)
def test_every_text_has_a_rule_and_none_may_be_empty(key):
    _, rule = FIELDS[key]
    assert isinstance(rule, OneOf | Matches)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{key} must be {rule}, got ')}"):
        with_value(key, "").check()


def test_every_default_keeps_its_rule():
    for key, (_, rule) in FIELDS.items():
        value = value_at(BASE, key)
        assert rule is None or value is None or rule.holds(value), key


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.crop_mode=foo", "data.crop_mode must be one of center, squash, border, got 'foo'"),
        ("data.hflip=7", "data.hflip must be in [0, 1], got 7.0"),
        ("data.scale=0,0", "data.scale must be numbers that are in (0, 1], the smaller one first, got 0.0, 0.0"),
        ("data.ratio=2,1", "data.ratio must be numbers that are above 0 and finite, the smaller one first, got 2.0, 1"),
        ("data.std=-1,1,1", "data.std must be numbers that are above 0 and finite, got -1.0, 1.0, 1.0"),
        ("data.mean=", "data.mean must be numbers that are finite, got none"),
        ("data.interpolation=random", "data.interpolation must be one of nearest"),
        ("run.device=gpu", "run.device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("run.device=cuda:x", "run.device must be auto, cpu, cuda or cuda:N, got 'cuda:x'"),
        ("optim.betas=0.9,1", "optim.betas must be numbers that are in [0, 1), got 0.9, 1.0"),
    ],
)
def test_refusal_names_key_rule_and_value(assignment, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BASE.override(assignment).check()


def test_rules_hold_at_their_bounds():
    for rule, value in ((count(1), 1), (Number(0, 1), 1), (Number(0, open_low=True), 1e-300), (OneOf((1, 3)), 3)):
        check("it", rule, value)
    with pytest.raises(ValueError, match="it must be one of 1, 3, got 2"):
        check("it", OneOf((1, 3)), 2)


def test_near_says_what_may_have_been_meant():
    assert near("adamv", ("adam", "adamw", "sgd")) == "; did you mean adam or adamw?"
    assert near("adamv", ("adam", "adamw", "sgd"), most=1) == "; did you mean adam?"
    assert near("xyz", ("adam", "adamw", "sgd")) == ""
