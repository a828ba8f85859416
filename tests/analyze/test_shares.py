"""Models whose tokens choose nothing: counts against loops, and a report from end to end."""

import json
from itertools import product

import pytest
import timm
import torch

import vmoe_torch
from tests.tiny import randomized
from vmoe_torch.analyze import Spread, analyze, collect_shares, describe_model, shares_of_patches
from vmoe_torch.analyze.share_figures import chosen_slots
from vmoe_torch.analyze.shares import effective_number
from vmoe_torch.cli import main
from vmoe_torch.data import FashionMnist

SMALL = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10}


def _model(kind, **changes):
    return randomized(timm.create_model(f"test_{kind}", **{**SMALL, **changes}))


@pytest.fixture
def batches():
    images = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(6))
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(3)]


def test_experts_per_token_are_counted(batches):
    model = _model("expert_choice")
    found = collect_shares(model, batches)
    assert list(found) == ["blocks.2.mlp", "blocks.3.mlp"]
    counts = {name: [0] * 5 for name in found}
    for images, _ in batches:
        maps = shares_of_patches(model, images)
        for name in found:
            assert maps[name].shape == (len(images), 4, 4)
            for taken in maps[name].flatten().tolist():
                counts[name][taken] += 1
    for name, counted in found.items():
        assert counted.counts.tolist() == counts[name]
        # 16 tokens and 4 experts of 4 slots each.
        assert counted.mean == 1.0
        present = [number for number, count in enumerate(counts[name]) if count]
        assert (counted.lowest, counted.highest) == (present[0], present[-1])
        assert counted.at_least(2) == sum(counts[name][2:]) / 80
    assert any(counted.lowest == 0 for counted in found.values())
    assert any(counted.highest > 1 for counted in found.values())


def test_mixtures_are_measured(batches):
    model = _model("soft_moe", slots_per_expert=2)
    found = collect_shares(model, batches)
    layer = vmoe_torch.moe_layers(model)["blocks.3.mlp"]
    slots, tokens = [], []
    for images, _ in batches:
        maps = shares_of_patches(model, images)["blocks.3.mlp"]
        assert maps.shape == (len(images), 8, 4, 4)
        torch.testing.assert_close(maps.sum((2, 3)), torch.ones(len(images), 8))
        for shares in maps.flatten(2).flatten(0, 1):
            slots.append(float((-(shares * shares.log()).sum()).exp()))
        for gates in layer.record.gates:
            tokens.append(float((-(gates * gates.log()).sum()).exp()))
    last = found["blocks.3.mlp"]
    for spread, numbers in ((last.tokens_of_a_slot, slots), (last.slots_of_a_token, tokens)):
        assert spread.count == len(numbers)
        assert spread.mean == pytest.approx(sum(numbers) / len(numbers), rel=1e-5)
        assert (spread.lowest, spread.highest) == pytest.approx((min(numbers), max(numbers)), rel=1e-5)
    assert last.tokens_of_a_slot.highest <= 16.001
    # Nothing stays on the routers.
    assert not layer.router._forward_hooks


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_shares_of_clips_are_those_of_the_router_by_time_row_and_column(router):
    options = {"img_size": 32, "patch_size": 8, "num_frames": 4, "router": router}
    model = randomized(timm.create_model("test_vmoe_video", **options))
    clips = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(6))
    layer = next(iter(vmoe_torch.moe_layers(model).values()))
    kept = []
    layer.own_router().register_forward_hook(lambda _router, _inputs, out: kept.append(out))
    found = next(iter(shares_of_patches(model, clips).values()))
    (routed,) = kept
    rest = found.shape[2:] if router == "soft" else found.shape[1:]
    assert rest == (2, 4, 4)
    first = model.num_prefix_tokens
    for clip, time, row, column in product(range(2), range(2), range(4), range(4)):
        token = first + (time * 4 + row) * 4 + column
        if router == "soft":
            assert torch.equal(found[clip, :, time, row, column], routed.mix[clip, token].float())
        else:
            taken = (routed.slots.view(2, -1, routed.slots.shape[1])[clip, token] >= 0).sum()
            assert found[clip, time, row, column] == taken
    assert found.float().std() > 0


def test_effective_numbers():
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(effective_number(shares, 1), torch.tensor([4.0, 2.0, 1.0]))
    assert Spread().mean == 0
    assert chosen_slots(shares[None, :, None], 2) == [2, 1]


def test_models_with_choices_are_refused(batches):
    with pytest.raises(ValueError, match="model must have a layer that routes by expert_choice or soft, got none"):
        collect_shares(timm.create_model("test_vmoe", depth=2, **SMALL), batches)
    data = FashionMnist("test")
    for given in ({"capacity_factors": (0.5,)}, {"num_selected_experts": (1,)}):
        with pytest.raises(ValueError, match="must be left out for a model of soft"):
            analyze(_model("soft_moe"), data, lambda image: image, **given)


@pytest.mark.parametrize("kind", ["soft_moe", "expert_choice"])
def test_report(kind, tmp_path, capsys):
    model = _model(kind)
    assert "2 layers of 4 experts" in describe_model(model)
    vmoe_torch.save_for_hf(model, tmp_path / "model")
    options = ["--data=fashion_mnist", "--images=24", "--batch-size=16"]
    assert main(["analyze", str(tmp_path / "model"), *options, f"--out={tmp_path / 'report'}"]) == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert found["images"] == 24
    assert found["layers"].keys() == {"blocks.2.mlp", "blocks.3.mlp"}
    layer = found["layers"]["blocks.3.mlp"]
    if kind == "soft_moe":
        assert found["routing"] == "soft, 4 experts of 1 slot"
        assert layer["tokens_of_a_slot"]["count"] == 24 * 4
        assert 1 <= layer["slots_of_a_token"]["lowest"] <= layer["slots_of_a_token"]["mean"] <= 4
        assert "What slots and tokens are mixtures of" in page
        assert "The slots of block 3 that draw from the fewest patches" in page
        names = {"slots.png"}
    else:
        assert found["routing"] == "expert choice, 4 experts, C=1"
        assert sum(layer["tokens_by_experts"]) == 24 * 16
        assert layer["experts_per_token"]["mean"] == 1.0
        assert "How many experts each token gets" in page
        names = {"experts_per_token.png", "experts_per_patch.png"}
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == names
    assert main(["analyze", str(tmp_path / "model"), *options, f"--out={tmp_path}", "--k=1"]) == 2
    assert "must be left out" in capsys.readouterr().err
    if kind == "soft_moe":
        assert main(["eval", str(tmp_path / "model"), "--data=fashion_mnist", "--capacity=0.5"]) == 2
        assert "capacity, K and priority do not apply" in capsys.readouterr().err
        assert main(["budget", str(tmp_path / "model"), "--data=fashion_mnist", "--flops=0.5"]) == 2
        assert "must route by top_experts or threshold, got soft" in capsys.readouterr().err
