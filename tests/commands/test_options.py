"""One vocabulary: what two commands both take has one name, one kind of value, one range and one help text."""

import re
from collections import defaultdict

import pytest
import torch

from tests.test_cli import fails
from tests.tiny import tiny_model
from vmoe_torch import cli
from vmoe_torch.commands.options import RENAMED

# "FILE" where a command writes a file, "DIR" where it writes a folder: what is in it differs.
RESULTS = {"--out"}
LISTS = {"M,M": "M", "T,T": "T", "C,C": "C", "K,K": "K", "ORDER,ORDER": "ORDER"}


def parsers():
    """The parser of each command by name."""
    return cli.parsers()[1]


def uses():
    """{option: [(command, action)]}; MODEL counts as one, where a command reads its weights."""
    found = defaultdict(list)
    for name, parser in parsers().items():
        for action in parser._actions:
            if action.option_strings not in (["-h", "--help"], ["--traceback"]):
                found[(action.option_strings or [action.dest])[-1]].append((name, action))
    return found


def meaning(action):
    """Help without the default, which commands may choose, and what more a command lets it be."""
    return re.sub(r"(,? or \"dynamic\"|, over all GPUs|; may be repeated)?( \(default: .*\))?$", "", action.help)


def test_options_mean_the_same_everywhere():
    shared = {option: users for option, users in uses().items() if len(users) > 1}
    assert {"--capacity", "--k", "--order", "--split", "--batch-size", "--workers", "--device"} <= shared.keys()
    assert {"--weights", "--max-broken", "--out", "--data", "--images", "--seed", "model"} <= shared.keys()
    for option, users in shared.items():
        if option in RESULTS:
            assert all(action.help.startswith("write ") and action.type is None for _, action in users)
            continue
        if option == "model":
            # vmoe plan reads no weights; vmoe convert takes files and folders only.
            users = [(name, action) for name, action in users if name not in ("plan", "convert")]
        if option == "out":
            continue
        assert len({meaning(action) for _, action in users}) == 1, option
        assert len({LISTS.get(action.metavar, action.metavar) for _, action in users}) == 1, option
        for several in (True, False):
            alike = [action for _, action in users if (action.metavar in LISTS) == several]
            # A whole number, or a word beside it.
            kinds = {"number" if option == "--batch-size" else str(action.type) for action in alike}
            assert len(kinds) <= 1, option
            assert len({str(action.choices) for action in alike}) <= 1, option


def test_ranges_are_the_same_everywhere():
    ranges = defaultdict(set)
    for parser in parsers().values():
        for option, rule in parser.get_default("rules") or ():
            ranges[option].add(str(rule))
    assert {option: found for option, found in ranges.items() if len(found) > 1} == {}


def test_every_command_takes_a_model_first():
    for name, parser in parsers().items():
        first = next((action for action in parser._actions if not action.option_strings), None)
        # vmoe doctor is about a machine.
        assert name in ("train", "doctor") or (first.dest, first.metavar) == ("model", "MODEL"), name


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_old_names_name_the_new_one(capsys, old):
    for command in (["predict", "runs/mine", "x.jpg", old], ["plan", f"{old}=1"], ["eval", old, "1"]):
        fails(capsys, command, f"{old} is now {RENAMED[old]}")
    known = {option for parser in parsers().values() for option in parser._option_string_actions}
    assert old not in known
    assert RENAMED[old].split()[0].rstrip(",") in {*known, "MODEL"}


def test_one_routing_for_every_command(capsys):
    """And the same error where there is none to set."""
    dense = "vmoe_dense_s32"
    plan = ["plan", dense, "--gpus=1", "--ep=1", "--batch-size=1"]
    fails(capsys, [*plan, "--k=1"], "MODEL must have MoE layers for --k, got a dense one: vmoe_dense_s32")
    fails(capsys, [*plan, "--k=1", "--capacity=1"], "MODEL must have MoE layers for --capacity and --k, got a dense")


def test_k_is_an_option_for_a_model_with_a_mean(tmp_path, capsys):
    torch.save(tiny_model(router="threshold", mean_selected_experts=1.4).state_dict(), tmp_path / "model.pt")
    command = ["plan", str(tmp_path / "model.pt"), "--gpus=1", "--ep=1", "--batch-size=4"]
    assert cli.main(command) == 0
    before = capsys.readouterr().out
    assert cli.main([*command, "--k=1"]) == 0
    assert capsys.readouterr().out != before
