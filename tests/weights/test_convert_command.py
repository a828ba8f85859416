"""`vmoe convert`: there and back, and one line for what a user can get wrong."""

import safetensors
import safetensors.torch
import torch

from tests.weights.test_golden_checkpoints import FOLDER
from vmoe_torch.checkpoints import read_index, read_original
from vmoe_torch.cli import main


def test_convert_goes_there_and_back(tmp_path):
    prefix, file, back = str(FOLDER / "train_state" / "ckpt"), str(tmp_path / "x.safetensors"), str(tmp_path / "y")
    assert main(["convert", prefix, file, "--train-state"]) == 0
    assert main(["convert", file, back, "--shards", "2"]) == 0
    got, want = read_original(back), read_original(prefix)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_convert_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert main(["convert", "a", "b"]) == 2
    assert capsys.readouterr().err == "vmoe convert: one of the two names must end in .safetensors, got a and b\n"
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "x.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"vmoe convert: checkpoint {tmp_path}/none does not exist; weights must be a run folder, ")
    assert error.count("\n") == 1
    prefix, file = str(FOLDER / "params_1shard" / "ckpt"), str(tmp_path / "x.safetensors")
    assert main(["convert", prefix, file]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    for arguments, said in (
        ([file, str(tmp_path / "y"), "--num-heads", "8"], "num_heads must be 4 or not given for these weights, got 8"),
        ([file, str(tmp_path / "y"), "--shards", "100000"], "num_shards must be in 1..99999, got 100000"),
        ([file, "http://localhost/y"], "prefix must be a local path"),
        ([prefix, "http://localhost/y.safetensors"], "the file to write must be a local one"),
        ([prefix, f"{file}/y.safetensors"], "[Errno"),
    ):
        assert main(["convert", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"vmoe convert: {said}")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_convert_without_room_is_one_line_and_leaves_the_older_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"older")

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert main(["convert", str(FOLDER / "params_1shard" / "ckpt"), str(file)]) == 2
    assert capsys.readouterr().err.startswith(f"vmoe convert: {file} could not be written: I/O error: No space left")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.safetensors", b"older")]


def test_number_of_heads_that_a_file_says_keeps_the_rest(tmp_path):
    """Where parameters and optimizer are in the tree, and which nodes are empty."""
    prefix, file = str(FOLDER / "train_state" / "ckpt"), str(tmp_path / "x.safetensors")
    assert main(["convert", prefix, file, "--train-state"]) == 0
    assert main(["convert", file, str(tmp_path / "y"), "--num-heads", "4"]) == 0
    assert read_original(str(tmp_path / "y")).keys() == read_original(prefix).keys()
    assert read_index(str(tmp_path / "y")).empty == read_index(prefix).empty


def test_converted_file_has_the_rights_of_a_new_file(tmp_path):
    (tmp_path / "new").touch()
    assert main(["convert", str(FOLDER / "params_1shard" / "ckpt"), str(tmp_path / "x.safetensors")]) == 0
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
