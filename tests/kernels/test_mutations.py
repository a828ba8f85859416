"""The faults of tests/semantics/mutations.py can be put into the kernels, and their table is of them, all noticed."""

import re
from pathlib import Path

import pytest

from tests.semantics.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.what)
def test_place_of_a_fault_is_there_once(mutation):
    text = (ROOT / "kernels" / "vmoe_kernels" / mutation.file).read_text()
    assert text.count(mutation.before) == 1
    assert mutation.after not in text


def test_table_is_of_these_faults():
    table = (ROOT / "tests" / "semantics" / "mutations.md").read_text()
    rows = re.findall(r"^\| \d+ \| ([\w ]+) \| (.+?) \| `(.+?)` \| (\w+) \|", table, re.MULTILINE)
    assert rows == [(each.kind, each.what, each.file, "yes") for each in MUTATIONS]
