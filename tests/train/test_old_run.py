"""A run's folder as earlier versions left it, a file per checkpoint: `old_run`, two epochs stopped after update 7.

Its configuration trains a model of width 8 on `tiny_images`; the numbers below are those of the version that wrote it.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vmoe_torch.cli import main
from vmoe_torch.commands.sources import open_model
from vmoe_torch.parallel import ShardedCheckpoints
from vmoe_torch.train import Config, load_model, read_checkpoint, train
from vmoe_torch.train.record.table import read_table
from vmoe_torch.train.start import build_starting_model

FOLDER = Path(__file__).with_name("old_run")
BEST, LAST = (Path("checkpoints") / name for name in ("best.pt", "update_00000007.pt"))
# Top-1 of the best epoch's moving average and of its weights; of both, the sum of all absolute values.
AVERAGE, WEIGHTS = (0.2, 489.0183), (0.15, 489.3107)
# Of the second epoch, when that version went on.
ENDED = {"train_loss": 2.2944090, "val_loss": 2.2944477, "ema_val_loss": 2.2964766}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "run"))


@pytest.fixture
def config(folder, tiny_images):
    """That of the folder, without an end before the second epoch's."""
    found = Config.from_file(folder / "config.json")
    return found.override(f"data.root={tiny_images}", f"run.output={folder}", "run.max_updates=none")


def total(model):
    return sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_it_goes_on_and_leaves_new_checkpoints(folder, config):
    result = train(config, resume=True)
    assert result.finished
    (row,) = result.history
    assert {name: row[name] for name in ENDED} == pytest.approx(ENDED, rel=1e-4)
    assert len(read_table(folder / "metrics.csv")) == 2
    assert names(folder) == ["best.safetensors", "update_00000010"]


def test_it_goes_on_spread(folder, config, tmp_path):
    for path in (folder / BEST, folder / LAST):
        state = torch.load(path, weights_only=True)
        state["ema"] = state["config"]["optim"]["ema_decay"] = None
        torch.save(state, path)
    config = config.override("optim.ema_decay=none")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        (row,) = train(config.override("parallel.fsdp=true"), resume=True).history
    finally:
        dist.destroy_process_group()
    assert row["val_loss"] == pytest.approx(ENDED["val_loss"], rel=1e-4)
    assert names(folder) == ["best.safetensors", "update_00000010"]


def test_damage_to_the_last_is_named(folder):
    content = bytearray((folder / LAST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / LAST).write_bytes(content)
    with pytest.warns(UserWarning, match=r"update_00000007\.pt is damaged, skipped: .* has changed"):
        assert ShardedCheckpoints(folder / "checkpoints", keep=1).usable() == []


@pytest.mark.parametrize(("weights", "want"), [("average", AVERAGE), ("last", WEIGHTS)])
def test_eval_takes_the_weights_it_is_told(folder, tiny_images, tmp_path, capsys, weights, want):
    assert total(open_model(folder, average=weights == "average").model) == pytest.approx(want[1], rel=1e-6)
    command = ["eval", str(folder), f"--data={tiny_images}", f"--weights={weights}", f"--out={tmp_path}/x.json"]
    assert main(command) == 0
    assert json.loads((tmp_path / "x.json").read_text())[0]["top1"] == pytest.approx(want[0])


def test_every_reader_takes_it(folder, config):
    model, found, class_names = load_model(folder)
    assert total(model) == pytest.approx(AVERAGE[1], rel=1e-6)
    assert (found.model, len(class_names)) == (config.model, 10)
    assert read_checkpoint(folder)["update"] == 5
    assert read_checkpoint(folder / LAST)["update"] == 7
    for path in (folder, folder / BEST, folder / "checkpoints"):
        begun = build_starting_model(config.override(f"model.checkpoint={path}").model, 10)
        assert total(begun) == pytest.approx(AVERAGE[1], rel=1e-6), path
    (folder / BEST).unlink()
    assert read_checkpoint(folder)["update"] == 7
