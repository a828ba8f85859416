"""Figures and the HTML page around them."""

import base64
import io
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from vmoe_torch.analyze import (
    Figure,
    LayerRouting,
    Report,
    Section,
    Table,
    capacity_curve,
    expert_by_class,
    gate_histograms,
    kept_patches_grid,
    write_report,
)
from vmoe_torch.evaluate import Evaluation, Flops, RoutingSetting

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps images, links and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.links, self.text, self.tags = [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.links.append(attributes["href"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def pictures(self):
        """The embedded images, decoded."""
        prefix = "data:image/png;base64,"
        assert all(image["src"].startswith(prefix) and image["alt"] for image in self.images)
        data = [base64.b64decode(image["src"].removeprefix(prefix), validate=True) for image in self.images]
        return [Image.open(io.BytesIO(picture)) for picture in data]


@pytest.fixture
def evaluations():
    return [
        Evaluation(
            RoutingSetting(capacity, selected, priority),
            100,
            0.8 - 0.2 * (1 - capacity) * (2 - priority),
            0.99,
            0.5,
            capacity,
            0.1,
            0.05,
            Flops(1e6 * (1 + selected * capacity), 2e6),
        )
        for selected in (1, 2)
        for capacity in (1.0, 0.5, 0.1)
        for priority in (False, True)
    ]


@pytest.fixture
def routing():
    kept = torch.tensor([[0, 9, 1], [8, 1, 1], [1, 8, 1], [0, 0, 0]])
    return LayerRouting(wanted=kept + 1, kept=kept, gates=torch.tensor([[0, 3, 7], [6, 4, 0]]), tokens=10)


def test_capacity_curve_draws_every_evaluation(evaluations):
    for against, find in (("capacity", lambda e: e.capacity_factor), ("flops", lambda e: e.flops.total / 1e6)):
        (axes,) = capacity_curve(evaluations, against).axes
        drawn = {
            (line.get_label(), round(x, 6), round(y, 6)) for line in axes.lines for x, y in line.get_xydata().tolist()
        }
        order = {False: "vanilla", True: "BPR"}
        assert drawn == {
            (
                f"{order[e.setting.batch_priority]}, K={e.setting.num_selected_experts}",
                round(find(e), 6),
                round(100 * e.top1, 6),
            )
            for e in evaluations
        }
        assert axes.get_xlabel()
        assert axes.get_title()
    with pytest.raises(ValueError, match="against must be 'capacity' or 'flops', got 'time'"):
        capacity_curve(evaluations, "time")


def test_capacity_curve_does_not_blow_up_small_differences(evaluations):
    low, high = capacity_curve(evaluations[-2:-1]).axes[0].get_ylim()
    assert high - low == pytest.approx(5.0)
    low, high = capacity_curve(evaluations).axes[0].get_ylim()
    assert low < 100 * min(e.top1 for e in evaluations)
    assert high > 100 * max(e.top1 for e in evaluations)


def test_capacity_curve_has_a_dense_line_only_if_given(evaluations):
    labels = [line.get_label() for line in capacity_curve(evaluations, dense=0.7).axes[0].lines]
    assert labels.count("dense counterpart") == 1
    assert "dense counterpart" not in [line.get_label() for line in capacity_curve(evaluations).axes[0].lines]


def test_expert_by_class_shows_the_shares_under_their_names(routing):
    axes = expert_by_class(routing, ["a", "b", "c", "empty"], "layer").axes[0]
    table = axes.images[0].get_array()
    classes = [label.get_text() for label in axes.get_xticklabels()]
    experts = [label.get_text() for label in axes.get_yticklabels()]
    assert table[experts.index("expert 1"), classes.index("a")] == pytest.approx(90.0)
    assert table[experts.index("expert 0"), classes.index("b")] == pytest.approx(80.0)
    assert table[experts.index("expert 2"), classes.index("empty")] == 0.0
    # Classes that use the same experts stand side by side.
    assert abs(classes.index("a") - classes.index("c")) == 1


def test_expert_by_class_survives_counts_without_structure():
    kept = torch.ones(3, 2, dtype=torch.int64)
    axes = expert_by_class(LayerRouting(kept, kept, torch.ones(1, 2)), ["a", "b", "c"], "layer").axes[0]
    assert (axes.images[0].get_array() == 50.0).all()


def test_kept_patches_grid_hides_dropped_patches_only():
    pictures = torch.rand(2, 4, 6)
    kept = torch.tensor([[[1, 0, 2], [0, 0, 1]], [[0, 0, 0], [2, 2, 2]]])
    canvas = kept_patches_grid(pictures, [("C = 1", kept)], ["a", "b"], "title")
    shown = [torch.as_tensor(image.get_array()) for image in canvas.axes[0].images]
    for number in range(2):
        assert torch.equal(shown[number], pictures[number].unsqueeze(-1).expand(-1, -1, 3))
        for row in range(4):
            for column in range(6):
                same = torch.equal(shown[2 + number][row, column], shown[number][row, column])
                assert same == bool(kept[number, row // 2, column // 2] > 0)


def test_report_is_one_well_formed_page_with_its_pictures(evaluations, routing, tmp_path):
    figures = [
        Figure("curve", capacity_curve(evaluations), "A <caption> & more", 'an "alt"'),
        Figure("gates", gate_histograms({"layer": routing}), "caption", "alt"),
    ]
    sections = [
        Section("Numbers", ["a < b"], {"term": "value"}, Table(["x", "y"], [["1", "2"]], frozenset({(0, 1)})), figures),
        Section("Files", links={"a file": "results.csv"}),
    ]
    path = write_report(Report("Title & more", ["summary"], sections), tmp_path / "new", dpi=40)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert "script" not in page.tags
    assert "http" not in text
    assert page.links == ["results.csv"]
    assert [image["alt"] for image in page.images] == ['an "alt"', "alt"]
    for piece in ("Title & more", "summary", "a < b", "A <caption> & more", "term", "value"):
        assert piece in page.text
    for picture, figure in zip(page.pictures(), figures, strict=True):
        picture.load()
        assert picture.format == "PNG"
        with Image.open(path.parent / f"{figure.name}.png") as beside:
            assert beside.size == picture.size


def test_report_refuses_two_figures_of_one_name(evaluations, tmp_path):
    twice = [Figure("curve", capacity_curve(evaluations), "caption", "alt") for _ in range(2)]
    with pytest.raises(ValueError, match="figures of a report must have different names"):
        write_report(Report("title", [], [Section("heading", figures=twice)]), tmp_path)
