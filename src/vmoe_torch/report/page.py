"""A self-contained HTML report: pictures embedded, plain CSS, no script, no other file needed."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape as escape_html
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from vmoe_torch.data.names import shown
from vmoe_torch.files import replacing, write_text

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem 1rem 3rem; background: #fff; color: #1c1c1c;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d8d8d8; }
p { max-width: 46rem; margin: .5rem 0; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) minmax(0, 1fr); gap: .3rem 1rem; margin: .8rem 0; }
dt { color: #555; }
dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
th { color: #555; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.words th, .words td { text-align: left; vertical-align: top; }
.words td:not(:last-child) { white-space: nowrap; }
.words td { overflow-wrap: anywhere; }
tbody tr.first td { border-top: 2px solid #8a8a8a; }
td.best { font-weight: 700; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem;
  margin-top: 1.2rem; }
.figures.wide { grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; max-width: 62rem; }
figcaption { max-width: 46rem; margin-top: .4rem; color: #3a3a3a; font-size: .93rem; }
ul { padding-left: 1.2rem; }
a { color: #00558a; }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 2rem; }
  h1 { font-size: 1.4rem; }
  th, td { padding: .3rem .15rem; font-size: .72rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; }
}
"""


@dataclass(frozen=True)
class Figure:
    """A picture of a report."""

    name: str
    """File name without ending."""
    canvas: Canvas | bytes
    """What to draw, or the bytes of a GIF."""
    caption: str
    """What one sees."""
    alt: str
    """A short description for those who do not see it."""


@dataclass(frozen=True)
class Table:
    """A table of a report: numbers, right-aligned, behind a first column of words."""

    header: Sequence[str]
    """Title of each column."""
    rows: Sequence[Sequence[str]]
    """Text of the cells of each row."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) cells to set in bold."""
    breaks: frozenset[int] = frozenset()
    """Rows that begin a new part."""
    words: bool = False
    """Whether every column has words."""


@dataclass
class Section:
    """A heading with any of paragraphs, facts, a table, figures and links."""

    heading: str
    """Title of the section."""
    paragraphs: Sequence[str] = ()
    """Plain text, first."""
    facts: dict[str, str] = field(default_factory=dict)
    """Name -> value, below the paragraphs."""
    table: Table | None = None
    """A table below the facts."""
    figures: Sequence[Figure] = ()
    """Pictures below the table."""
    wide: bool = False
    """One figure a line instead of as many as fit."""
    links: dict[str, str] = field(default_factory=dict)
    """Text -> path relative to the report."""


@dataclass
class Report:
    """A page: a title, a summary, sections."""

    title: str
    """Title of the page."""
    summary: Sequence[str]
    """Paragraphs at the top."""
    sections: Sequence[Section]
    """Parts of the page, in order."""


def write_report(
    report: Report, folder: Path | str, name: str = "report.html", dpi: int = 130, pictures: bool = True
) -> Path:
    """Writes the page whole or not at all, and beside it every figure as <name>.png, or <name>.gif.

    Args:
        report: what to write.
        folder: where to; made if it is missing.
        name: of the page.
        dpi: dots per inch of the pictures.
        pictures: whether to write the figures as files, too.

    Returns:
        The path of the page.

    Raises:
        ValueError: if two figures have the same name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [figure.name for section in report.sections for figure in section.figures]
    if len(set(names)) != len(names):
        raise ValueError(f"figures of a report must have different names, got {sorted(names)}")
    body = [f"<h1>{escape(report.title)}</h1>", *_paragraphs(report.summary)]
    for section in report.sections:
        body += _section(section, folder if pictures else None, dpi)
    page = "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title>",
            f"<style>{_CSS}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )
    path = folder / name
    write_text("page", path, page)
    return path


def escape(text: str) -> str:
    """Text for the page, names of files and classes in it as they can be shown."""
    return escape_html("\n".join(map(shown, text.split("\n"))))


def _section(section: Section, folder: Path | None, dpi: int) -> list[str]:
    parts = [f"<h2>{escape(section.heading)}</h2>", *_paragraphs(section.paragraphs)]
    if section.facts:
        facts = [f"<dt>{escape(term)}</dt><dd>{escape(value)}</dd>" for term, value in section.facts.items()]
        parts += ["<dl>", *facts, "</dl>"]
    if section.table is not None:
        parts += _table(section.table)
    if section.figures:
        parts.append('<div class="figures wide">' if section.wide else '<div class="figures">')
        parts += [_figure(figure, folder, dpi) for figure in section.figures]
        parts.append("</div>")
    if section.links:
        links = [f'<li><a href="{escape(path)}">{escape(text)}</a></li>' for text, path in section.links.items()]
        parts += ["<ul>", *links, "</ul>"]
    return parts


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [f"<p>{escape(text)}</p>" for text in texts]


def _table(table: Table) -> list[str]:
    lines = ['<table class="words">' if table.words else "<table>", "<thead><tr>"]
    lines += [f'<th scope="col">{escape(cell)}</th>' for cell in table.header]
    lines += ["</tr></thead>", "<tbody>"]
    for number, row in enumerate(table.rows):
        lines.append('<tr class="first">' if number in table.breaks else "<tr>")
        for column, cell in enumerate(row):
            bold = ' class="best"' if (number, column) in table.best else ""
            lines.append(f"<td{bold}>{escape(cell)}</td>")
        lines.append("</tr>")
    return [*lines, "</tbody>", "</table>"]


def _figure(figure: Figure, folder: Path | None, dpi: int) -> str:
    kind, data = "gif", figure.canvas
    if isinstance(figure.canvas, Canvas):
        file = io.BytesIO()
        figure.canvas.savefig(file, format="png", dpi=dpi, facecolor="white")
        kind, data = "png", file.getvalue()
    if folder is not None:
        with replacing(folder / f"{figure.name}.{kind}") as part:
            Path(part).write_bytes(data)
    text = base64.b64encode(data).decode("ascii")
    return (
        f'<figure><img alt="{escape(figure.alt)}" src="data:image/{kind};base64,{text}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )
