"""What the judge of tests/semantics needs, what it found, and the faults it must notice: that they can be put in."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.semantics import judge
from tests.semantics.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.what)
def test_place_of_a_fault_is_there_once(mutation):
    text = (ROOT / "kernels" / "vmoe_kernels" / mutation.file).read_text()
    assert text.count(mutation.before) == 1
    assert mutation.after not in text


def test_table_is_of_these_faults_and_all_were_noticed():
    table = (ROOT / "tests" / "semantics" / "mutations.md").read_text()
    rows = re.findall(r"^\| \d+ \| ([\w ]+) \| (.+?) \| `(.+?)` \| (\w+) \|", table, re.MULTILINE)
    assert rows == [(each.kind, each.what, each.file, "yes") for each in MUTATIONS]


def test_the_judge_found_nothing_and_the_readme_says_how_much_it_looked_at():
    head, *sections = (ROOT / "tests" / "semantics" / "results.md").read_text().split("\n## ")
    assert head.startswith("# What ttsem found")
    totals = {}
    for section in sections:
        header, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        totals[section.partition("\n")[0]] = counts = dict(zip(header[1:], map(int, rows[-1][1:])))
        for nothing in ("failed", "out of bounds", "races", "undefined", "not judged", "of it unequal"):
            assert counts[nothing] == 0, (section, nothing)
        assert rows[-1][0] == "all"
        assert counts["launches"] > 0
        assert ("TTGIR" in section.partition("\n")[0]) == (counts["TTGIR"] > 0)
    whole = totals["sm_90, every GPU test"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"[{whole['tests']} tests, {whole['launches']:,} launches, no fault, no race]" in readme


def test_what_the_judge_lacks_is_named(monkeypatch):
    monkeypatch.setattr(judge.launch, "triton_version", lambda: "3.6")
    assert judge.missing().startswith("ttsem reads the IR of Triton 3.8, this is ")
    monkeypatch.setattr(judge.launch, "triton_version", lambda: "3.8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ttsem" else object())
    assert judge.missing() == "needs ttsem: pip install --no-deps --ignore-requires-python -c constraints.txt ttsem"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert judge.missing() == "needs Triton"
