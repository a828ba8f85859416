"""What pages of the documentation take from the study."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.studies.typefaces import claims, report, router_report

# Between these lines of a page stands what the results give.
BEGIN, END = "<!-- from benchmarks/results/typefaces -->", "<!-- to here -->"


def typefaces_lines(content: Mapping[str, Any] | None) -> list[str]:
    """What the page of the study says, of results as JSON holds them or before there are any."""
    found = content["runs"] if content else []
    told = [*claims.table(found), *report.comparison(found)]
    if not told:
        return ["Nothing is measured yet."]
    return [*told, *report.wall_clock(content)][:-1]


# What each page takes from the results, by its place from the documentation's folder.
PAGES: dict[str, Callable[[Mapping[str, Any] | None], list[str]]] = {
    "typefaces.md": typefaces_lines,
    "routers.md": router_report.docs_lines,
}


def inserted(page: str, lines: Sequence[str]) -> str:
    """The page with these lines in their place.

    Raises:
        ValueError: if the page has no such place.
    """
    head, _, rest = page.partition(f"{BEGIN}\n")
    _, found, tail = rest.partition(f"{END}\n")
    if not found:
        raise ValueError(f"page must have the lines {BEGIN} and {END}, got {len(page)} characters without")
    return "\n".join([f"{head}{BEGIN}", "", *lines, "", f"{END}\n{tail}"])
