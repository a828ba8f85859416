"""The vmoe command: results, and one line on stderr with exit code 2 for what a user can get wrong."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from vmoe_torch.cli import main
from vmoe_torch.data import FashionMnist
from vmoe_torch.data.idx import write_idx
from vmoe_torch.train.logs import EPOCH_COLUMNS
from vmoe_torch.train.table import read_table

MODEL = ("patch_size=14", "embed_dim=32", "depth=2", "num_heads=2", "mlp_ratio=1.0", "num_experts=4")


def arguments(folder, *changes):
    """A run of two updates."""
    return [
        "train",
        "--recipe=fashion_mnist",
        f"run.output={folder}",
        "run.device=cpu",
        "data.batch_size=64",
        "run.max_updates=2",
        *(f"model.kwargs.{change}" for change in MODEL),
        *changes,
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of two updates."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(arguments(folder)) == 0
    return folder


@pytest.fixture
def image(tmp_path):
    """File of a Fashion-MNIST image."""
    FashionMnist("test")[0][0].save(tmp_path / "boot.png")
    return tmp_path / "boot.png"


def fails(capsys, arguments, *words):
    """The command ends with code 2 and one line that has these words."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"vmoe {arguments[0]}: ")
    for word in words:
        assert word in err


def test_train_leaves_a_run_folder(trained):
    assert json.loads((trained / "config.json").read_text())["model"]["kwargs"]["embed_dim"] == 32
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (trained / "metrics.csv").read_text().strip() == ",".join(EPOCH_COLUMNS)
    assert list((trained / "tb").iterdir())
    assert (trained / "checkpoints" / "update_00000002.pt").is_file()


def test_train_resumes_to_the_end_of_an_epoch(tmp_path, capsys):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        data = FashionMnist(split)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", data.images[:192])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", data.labels[:192].astype("uint8"))
    short = [f"data.root={tmp_path}", "schedule.epochs=1"]
    assert main(arguments(tmp_path / "run", *short)) == 0
    assert main(arguments(tmp_path / "run", *short, "run.max_updates=3", "--resume")) == 0
    assert [row["update"] for row in read_table(tmp_path / "run" / "metrics.csv")] == ["3"]
    assert "images/s" in capsys.readouterr().out


def test_train_takes_a_configuration_file(trained, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text((trained / "config.json").read_text())
    assert main(["train", "--config", str(file), "run.seed=7", "--print-config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"].pop("seed") == 7
    want = json.loads(file.read_text())
    want["run"].pop("seed")
    assert printed == want


def test_train_reports_what_a_user_gets_wrong(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(capsys, ["train"], "data.root must name the folder of images")
    fails(capsys, ["train", "optim.lrr=1"], "unknown config key 'optim.lrr'", "optim.lr")
    fails(capsys, ["train", "--recipe=mnist"], "recipe must be one of")
    fails(capsys, ["train", "--config=none.json"], "config file none.json cannot be read")
    fails(capsys, arguments(tmp_path / "file"), "run.output must be a folder that can be written")
    fails(capsys, arguments(tmp_path / "a", "model.kwargs.num_selected_experts=5"), "num_experts=4, got 5")
    fails(capsys, ["train", "data.root=/nowhere", f"run.output={tmp_path}/b"], "image folder /nowhere/train does not")


def test_train_names_a_broken_image(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("L", (28, 28)).save(tmp_path / split / name / f"{number}.png")
    broken = tmp_path / "train" / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    changes = ["data.name=folder", f"data.root={tmp_path}", "data.batch_size=4", "run.progress=false"]
    fails(capsys, arguments(tmp_path / "run", *changes), f"image {broken} cannot be read")


def test_predict_shows_the_best_classes(trained, image, capsys):
    assert main(["predict", str(image), str(image), "--checkpoint", str(trained), "--topk", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image)
    assert lines[:4] == lines[4:]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]


def test_predict_takes_routing_options(trained, image, capsys):
    outputs = []
    for options in ([], ["--num-selected-experts=1"], ["--capacity-factor=0.1", "--no-batch-priority"]):
        file = trained / "checkpoints" / "update_00000002.pt"
        assert main(["predict", str(image), "--topk=99", "--checkpoint", str(file), *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert all(len(output.splitlines()) == 11 for output in outputs)
    assert len(set(outputs)) > 1


def test_predict_reports_what_a_user_gets_wrong(trained, image, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    model = ["--checkpoint", trained]
    fails(capsys, ["predict", image, tmp_path / "broken.png", *model], "broken.png cannot be read")
    fails(capsys, ["predict", tmp_path / "none.png", *model], "none.png does not exist")
    fails(capsys, ["predict", image, *model, "--num-selected-experts=5"], "must be in 1..num_experts=4, got 5")
    fails(capsys, ["predict", image, *model, "--capacity-factor=0"], "capacity_factor must be above 0")
    fails(capsys, ["predict", image, *model, "--topk=0"], "--topk must be at least 1")
    fails(capsys, ["predict", image, "--checkpoint", tmp_path], "must hold a checkpoint, got none")


def test_unknown_keyword_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "--wings"])
    assert "usage: vmoe predict" in capsys.readouterr().err


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "vmoe_torch.cli", "train"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("vmoe train: data.root")
    assert "Traceback" not in done.stderr
