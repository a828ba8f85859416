"""Broken images in a run: replaced, named and counted, up to data.max_broken."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vmoe_torch.train import loop, train
from vmoe_torch.train.record.table import read_table


@pytest.fixture
def folder(tiny, tmp_path):
    """A run on a folder of 24 training and 8 validation images in two classes, of which some are broken."""
    root, broken = tmp_path / "images", ("train/a/3.png", "train/b/5.png", "val/b/1.png")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in "ab":
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                path = root / split / name / f"{number}.png"
                Image.fromarray(random.integers(0, 256, (28, 28), np.uint8)).save(path)
    for name in broken:
        (root / name).write_bytes((root / name).read_bytes()[:40])
    return tiny.override("data.name=folder", f"data.root={root}", "data.batch_size=8", "schedule.epochs=1")


# Python 3.12 warns of every fork beside torch's threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_broken_images_are_replaced_named_and_counted(folder, capfd):
    one = train(folder.override("data.max_broken=2"))
    shown = capfd.readouterr().err
    alarms = read_table(Path(folder.run.output) / "alarms.csv")
    assert [alarm["kind"] for alarm in alarms] == ["broken image"] * 3
    for alarm, name, count in zip(alarms, ("train/", "train/", "val/b/1.png"), (1, 2, 1)):
        assert name in alarm["message"]
        assert alarm["message"].endswith(f"skipped, {count} of data.max_broken=2")
        assert alarm["message"] in shown
    assert one.history[0]["val_accuracy"] in [pytest.approx(right / 7) for right in range(8)]
    two = train(folder.override("data.max_broken=2", "data.workers=2", f"run.output={folder.run.output}-workers"))
    for ours, theirs in zip(one.model.parameters(), two.model.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_the_run_with_their_names(folder, workers):
    with pytest.raises(
        ValueError, match=r"max_broken must be at least .*, 2 so far: image .*png cannot .*; image .*png "
    ):
        train(folder.override("data.max_broken=1", f"data.workers={workers}"))


def test_missing_split_is_named_before_anything_is_built(folder, monkeypatch):
    monkeypatch.setattr(loop, "build_model", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=r"image folder .*images/dev does not exist"):
        train(folder.override("data.val_split=dev"))
