"""The best epoch's weights as one file that says what they are of, and a run's folders as weights."""

import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import vmoe_torch
from vmoe_torch.commands.sources import open_model
from vmoe_torch.train import read_checkpoint, train
from vmoe_torch.train.checkpoint import write_best
from vmoe_torch.weights.sources import read_weights


def trained(config):
    """Result of a short run whose best epoch is its last, and its folder of checkpoints."""
    return train(config.override("schedule.epochs=1")), Path(config.run.output) / "checkpoints"


def equal(state, model):
    want = model.state_dict()
    return state.keys() == want.keys() and all(torch.equal(tensor, want[name]) for name, tensor in state.items())


def test_the_best_file_says_what_it_is_of(tiny):
    result, folder = trained(tiny)
    with safetensors.safe_open(folder / "best.safetensors", "pt") as file:
        header = file.metadata()
    run = json.loads(header["vmoe_torch_run"])
    assert run["config"] == json.loads((folder.parent / "config.json").read_text())
    assert (len(run["class_names"]), run["class_names"][9]) == (10, "ankle boot")
    assert run["metric"] == {"name": "ema_val_accuracy", "value": result.best_accuracy}
    assert (run["update"], run["average"]) == (5, True)
    normalise = open_model(folder).transform.transforms[-1]
    for name, values in run["normalisation"].items():
        assert values == pytest.approx(getattr(normalise, name).tolist()), name
    assert run["normalisation"].keys() == {"mean", "std"}
    assert header["format"] == "pt"
    assert {"", "blocks.1.mlp"} <= json.loads(header["vmoe_torch_metadata"]).keys()
    assert equal(load_file(folder / "best.safetensors"), result.ema)


def test_other_programs_load_the_best_file(tiny):
    result, folder = trained(tiny.override("optim.ema_decay=none"))
    path = str(folder / "best.safetensors")
    model = timm.create_model("vmoe_s32", num_classes=10, checkpoint_path=path, **tiny.model.kwargs)
    assert equal(model.state_dict(), result.model)


def test_last_weights_are_those_of_the_newest_update(tiny):
    result, folder = trained(tiny)
    for place in (folder.parent, folder):
        assert equal(open_model(place).model.state_dict(), result.ema)
        assert equal(open_model(place, average=False).model.state_dict(), result.model)
    update = folder / "update_00000005"
    assert equal(open_model(update, average=True).model.state_dict(), result.ema)
    assert equal(read_checkpoint(update)["model"], result.model)
    with pytest.raises(
        ValueError, match=r"must hold the last weights, got their moving average alone; update_\* beside"
    ):
        open_model(folder / "best.safetensors", average=False)
    (folder / "best.safetensors").unlink()
    assert equal(read_checkpoint(folder)["ema"], result.ema)


def test_chosen_routing_is_in_both(tiny, monkeypatch):
    made = vmoe_torch.VMoE.train

    def chosen(self, mode=True):
        vmoe_torch.set_routing(self, eval_capacity_factor=0.5)
        return made(self, mode)

    with monkeypatch.context() as patch:
        patch.setattr(vmoe_torch.VMoE, "train", chosen)
        _, folder = trained(tiny.override("optim.ema_decay=none"))
    for name in ("best.safetensors", "update_00000005"):
        model = open_model(folder / name).model
        assert vmoe_torch.moe_layers(model)["blocks.1.mlp"].chosen_routing() == {"eval_capacity_factor": 0.5}


def test_damage_is_named(tiny):
    _, folder = trained(tiny)
    best, update = folder / "best.safetensors", folder / "update_00000005"
    best.write_bytes(best.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"best\.safetensors must be a readable safetensors file, got: .*[Ii]ncomplete"
    ):
        open_model(folder)
    best.write_bytes(b"")
    with pytest.raises(ValueError, match=r"best\.safetensors is empty"):
        open_model(folder)
    best.unlink()
    (update / "state.pt").write_bytes(b"half")
    for place in (update, folder):
        with pytest.raises(ValueError, match=r"update_00000005 is damaged: state\.pt must have \d+ bytes, has 4"):
            open_model(place)


def test_nothing_in_a_folder_is_run(tiny, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    _, folder = trained(tiny)
    update = folder / "update_00000005"
    (update / ".metadata").write_bytes(pickle.dumps(Runs()))
    (update / "complete.json").write_text("{}")
    with pytest.raises(ValueError, match=r"update_00000005 cannot be read: it must not name \w+\.mkdir"):
        open_model(update)
    with pytest.raises(ValueError, match=r"update_00000005 cannot be read: it must not name \w+\.mkdir"):
        train(tiny.override("schedule.epochs=1"), resume=True)
    assert not (tmp_path / "made").exists()


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "best.safetensors"
    write_best(path, {"weight": torch.ones(1)}, {})
    before = path.read_bytes()

    def fail(tensors, part, metadata):
        Path(part).write_bytes(b"part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(
        OSError, match=r"checkpoint .*best\.safetensors cannot be written: .*No space left.*; \d+ MiB are"
    ):
        write_best(path, {"weight": torch.ones(1)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    read_weights(path, average=False)
