"""`vmoe convert`: there and back, and one line for what a user can get wrong."""

import torch

from tests.checkpoints.test_golden_checkpoints import FOLDER
from vmoe_torch.checkpoints import read_original
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
    assert error.startswith(f"vmoe convert: {tmp_path}/none.index must be a readable file, got ")
    assert error.count("\n") == 1
