"""How many experts tokens get: counted, drawn and told, where a threshold decides."""

import json

import pytest
import torch
from PIL import Image

import vmoe_torch
from tests.tiny import dropping, grey_images
from vmoe_torch.analyze import (
    LayerRouting,
    PatchExperts,
    analyze,
    collect_routing,
    describe_routing,
    experts_per_patch,
    experts_per_token,
    number_section,
)


class Transform:
    """(1, 16, 16) in -1..1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.tensor(list(image.get_flattened_data()), dtype=torch.float32).view(1, 16, 16) / 64 - 1


def _dataset(count: int = 12) -> list[tuple[Image.Image, int]]:
    pixels = (grey_images(count) * 40 + 128).clamp(0, 255).byte()
    return [(Image.fromarray(each[0].numpy()), number % 4) for number, each in enumerate(pixels)]


def _by_threshold(mean: float = 1.2):
    model = dropping(capacity_factor=4.0)
    vmoe_torch.set_routing(model, mean_selected_experts=mean, data=grey_images(12))
    return model


def test_counts_are_those_of_the_slots():
    model, images = _by_threshold(), grey_images(8)
    labels = torch.arange(8) % 4
    (found, _) = collect_routing(model, [(images, labels)], 4).values()
    with torch.no_grad():
        model(images)
    record = model.blocks[0].mlp.record
    numbers = (record.slots >= 0).sum(1)
    assert found.numbers.tolist() == [int((numbers == number).sum()) for number in range(3)]
    assert int(found.wanted.sum()) == int(record.selected.sum()) < 2 * 8 * 17
    assert found.dropped == 0
    assert found.unprocessed == found.numbers[0] > 0


def test_nothing_is_dropped_where_nothing_is_wanted():
    (found, _) = collect_routing(dropping(gate_threshold=1.0), [(grey_images(4), torch.arange(4))], 4).values()
    assert (int(found.wanted.sum()), found.unprocessed, found.dropped) == (0, 4 * 17, 0)


def test_report_of_layers_that_differ_in_their_experts(tmp_path):
    model = dropping(capacity_factor=4.0, gate_threshold=0.1)
    usage = {name: torch.arange(4) for name in vmoe_torch.moe_layers(model)}
    pruned = vmoe_torch.prune_experts(model, {"blocks.1.mlp": 1}, usage=usage)
    analysis = analyze(pruned, _dataset(4), Transform(), capacity_factors=(1.0,), pictures=2, batch_size=4)
    assert analysis.selected == []
    analysis.write(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Random routers" in page
    assert "numbers of experts" not in page
    assert not (tmp_path / "experts_per_token.png").exists()


def test_report_of_a_threshold(tmp_path):
    model = _by_threshold()
    assert describe_routing(model) == "K=2, C=4, BPR, 1.2 experts per token"
    analysis = analyze(model, _dataset(), Transform(), capacity_factors=(1.0, 0.5), pictures=3, batch_size=8)
    analysis.write(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "How many experts a token gets" in page
    assert (tmp_path / "numbers.png").exists()
    assert (tmp_path / "number_maps.png").exists()
    layers = json.loads((tmp_path / "report.json").read_text())["layers"]
    assert [sum(layer["experts_per_token"]) for layer in layers.values()] == [12 * 17] * 2
    assert [shape.shape for shape in analysis.patch_experts.numbers.values()] == [(3, 4, 4)] * 2
    assert 0 < float(analysis.own.selected) < 2


def test_without_a_threshold_there_is_no_section(tmp_path):
    analysis = analyze(dropping(), _dataset(), Transform(), capacity_factors=(1.0,), pictures=2, batch_size=8)
    assert analysis.patch_experts is None
    assert number_section(analysis.routings, None) is None
    assert describe_routing(dropping()) == "K=2, C=0.5, BPR"
    assert describe_routing(dropping(gate_threshold=0.25)) == "K=2, C=0.5, BPR, gates from 0.25 on"


@pytest.fixture
def patches() -> PatchExperts:
    numbers = torch.tensor([[[0, 1, 2], [2, 2, 2]], [[0, 0, 0], [0, 0, 1]]])
    return PatchExperts(torch.rand(2, 4, 6), ("a", "b"), 2, {f"blocks.{number}.mlp": numbers for number in range(6)})


def test_maps_show_the_numbers(patches):
    canvas = experts_per_patch(patches, ["blocks.1.mlp"], "maps")
    axes = canvas.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert {"block 1", "1.50", "0.17", "a", "b"} <= set(texts)
    first = torch.tensor(axes.images[2].get_array())
    # Patches of 2 x 2 pixels: none, one and two experts have three colours, the same for the same number.
    tint = first - 0.45 * patches.pictures[0].unsqueeze(-1)
    assert torch.allclose(tint[:2, 4:], tint[2:, :2], atol=1e-5)
    assert not torch.allclose(tint[:2, :2], tint[:2, 2:4], atol=0.05)
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["0 experts", "1 expert", "2 experts"]


def test_bars_show_the_shares():
    counts = torch.zeros(2, 2, dtype=torch.int64)
    routing = LayerRouting(counts, counts, counts, numbers=torch.tensor([5, 80, 15]))
    canvas = experts_per_token({"blocks.1.mlp": routing})
    assert [text.get_text() for text in canvas.axes[0].texts] == ["80", "15"]
    assert [bar.get_width() for bar in canvas.axes[0].patches] == pytest.approx([5, 80, 15])


def test_section_says_where(patches):
    counts = torch.zeros(2, 2, dtype=torch.int64)
    made = {
        f"blocks.{n}.mlp": LayerRouting(counts, counts, counts, 100, n, numbers=torch.tensor([n, 90 - n, 10]))
        for n in range(6)
    }
    section = number_section(made, patches)
    (text,) = section.paragraphs
    assert "from none to 2 experts" in text
    assert "mean is 1.05 in block 5 and 1.10 in block 0" in text
    assert "has block 5, 5.0%" in text
    assert "class b, 0.17, and largest for the one of class a, 1.50" in section.figures[1].caption
