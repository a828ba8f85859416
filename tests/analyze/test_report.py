"""The HTML page around figures and tables."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from vmoe_torch.analyze import (
    Figure,
    Report,
    Section,
    Table,
    capacity_curve,
    gates_by_depth,
    kept_patches_animation,
    write_report,
)

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
        assert all(image["src"].startswith("data:image/") and image["alt"] for image in self.images)
        data = [base64.b64decode(image["src"].partition(";base64,")[2], validate=True) for image in self.images]
        return [Image.open(io.BytesIO(picture)) for picture in data]


def test_report_is_one_well_formed_page_with_its_pictures(evaluations, routing, patches, tmp_path):
    figures = [
        Figure("curve", capacity_curve(evaluations), "A <caption> & more", 'an "alt"'),
        Figure("gates", gates_by_depth({"layer": routing}), "caption", "alt"),
        Figure("moving", kept_patches_animation(patches, "layer", "title"), "caption", "alt"),
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
    assert [image["alt"] for image in page.images] == ['an "alt"', "alt", "alt"]
    for piece in ("Title & more", "summary", "a < b", "A <caption> & more", "term", "value"):
        assert piece in page.text
    for picture, figure in zip(page.pictures(), figures, strict=True):
        picture.load()
        ending = "gif" if figure.name == "moving" else "png"
        assert picture.format == ending.upper()
        with Image.open(path.parent / f"{figure.name}.{ending}") as beside:
            assert beside.size == picture.size


def test_report_refuses_two_figures_of_one_name(evaluations, tmp_path):
    twice = [Figure("curve", capacity_curve(evaluations), "caption", "alt") for _ in range(2)]
    with pytest.raises(ValueError, match="figures of a report must have different names"):
        write_report(Report("title", [], [Section("heading", figures=twice)]), tmp_path)


def test_report_without_pictures_is_one_file(evaluations, tmp_path):
    figure = Figure("curve", capacity_curve(evaluations), "caption", "alt")
    path = write_report(Report("Title", [], [Section("One", figures=[figure])]), tmp_path, pictures=False)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert len(Page(path.read_text()).pictures()) == 1


def test_names_of_every_kind_can_be_written(tmp_path):
    name = "b\udce9 \x1b[31m <i>"
    section = Section(name, [name], {name: name}, Table((name,), [(name,)]), links={name: "x"})
    page = write_report(Report(name, ["one\ntwo", name], [section]), tmp_path).read_text(encoding="utf-8")
    assert page.count(r"b\xe9 \x1b[31m &lt;i&gt;") == 10
    assert "one\ntwo" in page
    assert "\x1b" not in page
