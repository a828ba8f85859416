"""A CSV file that grows row by row and survives stops: what a resumed run writes anew is dropped first."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmoe_torch.files import cannot_write, csv_text, write_text


class CsvTable:
    """Appends rows, each on the disk's side before the next update begins.

    Args:
        path: of the file; its rows are kept where it is there already and has these columns.
        columns: by name; one is "update".
        first_update: the run goes on from here; rows beyond it are dropped.

    Raises:
        OSError: if the file cannot be written, naming it; then it is as it was.
    """

    def __init__(self, path: Path, columns: Sequence[str], first_update: int):
        self.path = path
        self.columns = tuple(columns)
        kept = csv_text((row for row in read_table(path) if int(row["update"]) <= first_update), self.columns)
        if not path.is_file() or path.read_bytes() != kept.encode(errors="backslashreplace"):
            write_text("table", path, kept)

    def add(self, *rows: dict[str, Any]) -> None:
        """One row or several.

        Raises:
            OSError: if the file cannot be written, naming it.
        """
        try:
            with open(self.path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
                csv.DictWriter(file, self.columns).writerows(rows)
        except OSError as error:
            raise cannot_write("table", self.path, error) from error


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a file; none if there is no such file. A row that a full disk cut off is left out."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and row.get("update", "").isdigit()]
