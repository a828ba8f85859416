"""What is known of a run: what it found here, or what was published of it when its folder was elsewhere."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.studies.typefaces.runs import Run
from vmoe_torch.files import write_json

# Of a run that finished here, whose weights are in the folder, too; and of one that finished elsewhere.
RESULT, PUBLISHED = "result.json", "published.json"


def write_result(file: Path, found: dict) -> dict:
    """Writes what was found, and returns it; the file is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json("result", file, found)
    return found


def finished(run: Run, folder: Path) -> bool:
    """Whether it finished in this folder of runs."""
    return (folder / run.name / RESULT).exists()


def found(run: Run, folder: Path) -> dict | None:
    """What the run found, here or else elsewhere."""
    files = (folder / run.name / name for name in (RESULT, PUBLISHED))
    return next((json.loads(file.read_text()) for file in files if file.exists()), None)


def published(file: Path) -> dict:
    """What results.json holds; nothing if there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def restore(content: Mapping[str, Any], runs: Iterable[Run], folder: Path) -> list[str]:
    """Gives runs that did not finish here what was published of them, if their settings are those of now.

    Args:
        content: what results.json holds, see `published`.
        runs: all runs of the study.
        folder: of the runs.

    Returns:
        Names of the runs that are known from there.

    Raises:
        ValueError: if the folder holds what a run found with other settings.
    """
    known = {run["name"]: run for run in content.get("runs", ())}
    names = []
    for run in runs:
        here = folder / run.name / RESULT
        if here.exists() and json.loads(here.read_text())["fingerprint"] != run.fingerprint():
            raise ValueError(f"{here} must be of the settings of now, got others: move its folder away")
        old = known.get(run.name)
        place = folder / run.name / PUBLISHED
        if old is not None and old["fingerprint"] == run.fingerprint():
            write_result(place, old)
            names.append(run.name)
        else:
            place.unlink(missing_ok=True)
    return names


def needed(runs: Iterable[Run], folder: Path) -> list[Run]:
    """What has to run for some runs to be known: those themselves, and before them whose weights they begin with.

    So a run that finished elsewhere runs again if its weights are asked for; what it finds now then stands for it.
    """
    chosen: dict[str, Run] = {}
    for run in runs:
        if found(run, folder) is not None:
            continue
        if run.after is not None and not finished(run.after, folder):
            chosen[run.after.name] = run.after
        chosen[run.name] = run
    return list(chosen.values())
