"""Checkpoints: whole or not at all, and refused before they change anything."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from vmoe_torch.parallel import ShardedCheckpoints
from vmoe_torch.train import load_model, load_weights, read_checkpoint, train
from vmoe_torch.train.checkpoint import random_states, set_random_states, write_atomically, write_best


def test_load_weights_names_the_keys_and_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {
        "0.weight": torch.ones(3, 2),
        "0.bias": torch.ones(4),
        "1.weight": torch.ones(1, 3),
        "2.bias": torch.ones(1),
    }
    message = r"missing 1: 1\.bias; unknown 1: 2\.bias; of another shape 1: 0\.bias \(4,\) instead of \(3,\)"
    with pytest.raises(ValueError, match=message):
        load_weights(model, weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_checkpoint_of_another_shape_is_refused_by_train(tiny):
    train(tiny.override("run.max_updates=1"))
    wider = tiny.override(
        "model.kwargs.embed_dim=64", f"model.checkpoint={tiny.run.output}", f"run.output={tiny.run.output}-wide"
    )
    with pytest.raises(ValueError, match=r"run must fit the model: .* must be \(64,\), got \(32,\)"):
        train(wider)


def test_train_begins_with_a_checkpoint(tiny):
    first = train(tiny.override("run.max_updates=2"))
    second = train(
        tiny.override(
            f"model.checkpoint={tiny.run.output}",
            f"run.output={tiny.run.output}-more",
            "run.max_updates=1",
            "optim.lr=0",
            "optim.weight_decay=0",
        )
    )
    for name, tensor in second.model.state_dict().items():
        torch.testing.assert_close(tensor, first.ema.state_dict()[name])


def test_load_model_gives_the_moving_average_in_eval_mode(tiny):
    result = train(tiny.override("run.max_updates=2"))
    model, config, class_names = load_model(tiny.run.output)
    assert not model.training
    assert config == tiny.override("run.max_updates=2")
    assert class_names[9] == "ankle boot"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, result.ema.state_dict()[name]), name


def test_random_states_come_back():
    states = random_states()
    want = random.random(), np.random.rand(), np.random.randn(), torch.rand(3)
    set_random_states(states)
    got = random.random(), np.random.rand(), np.random.randn(), torch.rand(3)
    assert want[:3] == got[:3]
    assert torch.equal(want[3], got[3])


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_atomically(path, {"update": 1})

    def fail(state, file):
        file.write(b"part")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, {"update": 2})
    monkeypatch.undo()
    assert torch.load(path) == {"update": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def save(checkpoints, update):
    """A checkpoint of a model of one layer."""
    model = nn.Linear(100, 10)
    checkpoints.save(update, model, torch.optim.SGD(model.parameters()), {"update": update})


def test_checkpoint_folder_keeps_the_last(tmp_path):
    folder = ShardedCheckpoints(tmp_path / "new", keep=2)
    assert folder.usable() == []
    for update in (9, 10, 100):
        if update == 10:
            write_best(folder.folder / "best.safetensors", {"weight": torch.ones(1)}, {})
        save(folder, update)
    names = ["best.safetensors", "update_00000010", "update_00000100"]
    assert sorted(p.name for p in folder.folder.iterdir()) == names
    assert folder.usable(1)[0].name == "update_00000100"


def test_damaged_checkpoints_are_skipped_and_push_no_later_one_out(tmp_path):
    folder = ShardedCheckpoints(tmp_path, keep=1)
    kept = ShardedCheckpoints(tmp_path, keep=3)
    for update in (1, 10, 20):
        save(kept, update)
    file = "__0_0.distcp"
    content = bytearray((tmp_path / "update_00000010" / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "update_00000010" / file).write_bytes(content)
    (tmp_path / "update_00000020" / file).write_bytes(content[:100])
    with pytest.warns(UserWarning, match="is damaged, skipped") as caught:
        assert folder.usable(1)[0].name == "update_00000001"
    assert [f"update_000000{number}" in str(w.message) for number, w in zip((20, 10), caught)] == [True, True]
    save(folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["update_00000002"]
    save(kept, 30)
    save(folder, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update_00000003", "update_00000030"]


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
@pytest.mark.parametrize("name", ["adafactorbv", "adopt", "kron", "lamb", "muon", "sgd"])
def test_what_an_optimiser_keeps_comes_back_to_the_bit(tmp_path, name):
    """Moments of other shapes, lists of tensors, counts in its groups."""

    def made(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
        return model, create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.01)

    def steps(model, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()

    checkpoints = ShardedCheckpoints(tmp_path, keep=1)
    whole, again = made(0), made(1)
    steps(*whole, seed=0)
    checkpoints.save(3, *whole, {})
    checkpoints.load(*again)
    for model in (whole, again):
        steps(*model, seed=1)
    for name, tensor in again[0].state_dict().items():
        assert torch.equal(tensor, whole[0].state_dict()[name]), name


def test_kill_between_two_checkpoints_of_one_update_loses_none(tmp_path, monkeypatch):
    """Where an epoch's end is saved again after its validation, and that is all that is kept."""
    folder = ShardedCheckpoints(tmp_path, keep=1)
    save(folder, 5)
    rename = os.rename

    def die(source, target):
        if Path(target).name == "update_00000005":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 5)
    assert [path.name for path in tmp_path.iterdir()] == [".update_00000005"]
    assert ShardedCheckpoints(tmp_path, keep=1).usable() == [tmp_path / "update_00000005"]
    assert [path.name for path in tmp_path.iterdir()] == ["update_00000005"]


def test_kill_while_an_old_checkpoint_is_removed_leaves_no_half(tmp_path, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    folder = ShardedCheckpoints(tmp_path, keep=1)
    save(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 2)
    assert ShardedCheckpoints(tmp_path, keep=1).usable() == [tmp_path / "update_00000002"]
    save(folder, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["update_00000003"]


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(tiny, tmp_path):
    config = tiny.override("schedule.epochs=1", "run.checkpoint_every=2")
    whole = train(config.override(f"run.output={tmp_path}/whole"))
    train(config.override("run.max_updates=4"))
    newest = tmp_path / "run" / "checkpoints" / "update_00000004" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"update_00000004 is damaged, skipped"):
        again = train(config, resume=True)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_kill_between_a_checkpoint_and_the_best_one_loses_none(tiny, monkeypatch):
    """The numbered one says which accuracy is the best, so the best one is there before it."""

    def die(*arguments):
        write_best(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("vmoe_torch.train.state.write_best", die)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.override("schedule.epochs=1"))
    assert [path.name for path in (Path(tiny.run.output) / "checkpoints").iterdir()] == ["best.safetensors"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, r"checkpoint .*none\.pt does not exist"),
        ("broken.pt", b"no checkpoint", r"checkpoint .*broken\.pt cannot be read"),
        (".", None, "must hold a checkpoint, got none"),
    ],
)
def test_read_checkpoint_names_what_it_cannot_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / name)


def test_read_checkpoint_of_a_damaged_folder_says_so(tmp_path):
    (tmp_path / "checkpoints" / "update_00000002").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"update_00000002 is damaged: complete\.json cannot be read"):
        read_checkpoint(tmp_path)


def test_read_checkpoint_refuses_other_files(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must be a checkpoint of vmoe train"):
        read_checkpoint(tmp_path / "a.pt")
