"""The table of the experts' products: what it counts, and that what is committed got no worse."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="needs Triton")

from benchmarks.compile import gemms
from benchmarks.compile.launches import CALLS, HEADLINE, record
from benchmarks.harness.cases import Case

# 2 experts of 5 groups of 100 tokens each, 105 rows a group.
SMALL = Case(images=5, tokens_per_image=100, group_images=1, width=256, hidden=512, num_experts=2)


@pytest.fixture(scope="module")
def launches():
    """Of a step of training on sm_90, by op."""
    with record(90) as found:
        CALLS[HEADLINE]()
    return {each.name: each for each in found}


def test_sizes_are_those_of_the_products():
    rows = SMALL.rows
    assert gemms.sizes(SMALL, "expert_up") == gemms.sizes(SMALL, "expert_d_hidden") == (rows, 512, 256)
    assert gemms.sizes(SMALL, "expert_down") == gemms.sizes(SMALL, "expert_d_rows") == (rows, 256, 512)
    assert gemms.sizes(SMALL, "expert_d_fc1") == (512, 256, rows)
    assert gemms.sizes(SMALL, "expert_d_fc2") == (256, 512, rows)


def test_tiles_say_what_tells_them_apart(launches):
    assert gemms.tile(launches["expert_down"]) == "128x256x64, 8 warps, persistent, TMA"
    assert gemms.tile(launches["expert_d_fc1"]) == "128x128x64, 8 warps"


def test_costs_count_what_tiles_read_and_issue(launches):
    rows = SMALL.rows
    assert 512 < rows <= 640  # five tiles of 128
    l2, bounds = gemms.costs(SMALL, "expert_down", launches["expert_down"], step=100, rest=1000)
    # Of each of 2 experts 5 x 1 tiles read 128 and 256 rows of 512 bfloat16.
    assert l2 == 2 * 5 * (128 + 256) * 512 * 2
    assert bounds["L2"] == round(l2 / 6e12 * 1e6, 1)
    assert bounds["issue"] == round(10 * 8 * (100 * 8 + 1000) / (132 * 4 * 1.83e9) * 1e6, 1)
    assert bounds["products"] == round(2 * 2 * rows * 256 * 512 / 790e12 * 1e6, 1)
    narrow = replace(launches["expert_down"], constexprs={**launches["expert_down"].constexprs, "BLOCK_COLS": 128})
    assert gemms.costs(SMALL, "expert_down", narrow, 100, 1000)[0] == 2 * 5 * 2 * (128 + 128) * 512 * 2


@pytest.mark.parametrize("chip", gemms.CHIPS)
def test_what_is_committed_is_of_todays_tiles(chip):
    """Tiles, traffic and predicted times; registers and instructions are the compile report's to hold."""
    with record(chip) as found:
        CALLS[HEADLINE]()
    for row in json.loads(gemms.FILE.read_text())["after"]:
        if row["chip"] == chip:
            launch = next(each for each in found if each.name == row["kernel"])
            rest = row["instructions"] - row["step"]
            l2, bounds = gemms.costs(gemms.CASE, row["kernel"], launch, row["step"], rest)
            assert row["tile"] == gemms.tile(launch)
            assert row["l2_megabytes"] == round(l2 * 1e-6)
            assert row["bounds_us"] == (bounds if chip == 90 else None)


def test_what_is_committed_got_no_worse():
    content = json.loads(gemms.FILE.read_text())
    before = {(row["kernel"], row["chip"]): row for row in content["before"]}
    assert {(row["kernel"], row["chip"]) for row in content["after"]} == {
        (op, chip) for op in gemms.OPS for chip in gemms.CHIPS
    }
    for row in content["after"]:
        assert row["stack"] == row["local"] == 0
        old = before.get((row["kernel"], row["chip"]))
        if old is not None:
            assert row["buffers"] >= old["buffers"]
            assert row["l2_megabytes"] <= old["l2_megabytes"]
