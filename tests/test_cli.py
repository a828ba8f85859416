"""The vmoe command: results, and one line on stderr with exit code 2 for what a user can get wrong."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from tests.tiny import small_run, write_fashion_mnist
from vmoe_torch import cli
from vmoe_torch.cli import main
from vmoe_torch.commands import eval as eval_command
from vmoe_torch.commands.options import integers, numbers
from vmoe_torch.data import FashionMnist
from vmoe_torch.train.record.logs import EPOCH_COLUMNS
from vmoe_torch.train.record.table import read_table


def arguments(folder, *changes):
    """A run of two updates."""
    return ["train", "--recipe=fashion_mnist", *small_run(folder), *changes]


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
    assert (trained / "checkpoints" / "update_00000002").is_dir()


def test_train_resumes_to_the_end_of_an_epoch(tmp_path, capsys):
    write_fashion_mnist(tmp_path, 192, 192)
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
    assert main(["predict", str(trained), str(image), str(image), "--topk", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image)
    assert lines[:4] == lines[4:]
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "3"]


def test_predict_takes_routing_options(trained, image, capsys):
    outputs = []
    for options in ([], ["--k=1"], ["--capacity=0.1", "--order=vanilla"]):
        file = trained / "checkpoints" / "update_00000002"
        assert main(["predict", "--topk=99", str(file), str(image), *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert all(len(output.splitlines()) == 11 for output in outputs)
    assert len(set(outputs)) > 1


def test_predict_reports_what_a_user_gets_wrong(trained, image, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    start = ["predict", trained]
    fails(capsys, [*start, image, tmp_path / "broken.png"], "broken.png cannot be read")
    fails(capsys, [*start, tmp_path / "none.png"], "none.png does not exist")
    fails(capsys, [*start, image, "--k=5"], "must be in 1..num_experts=4, got 5")
    fails(capsys, [*start, image, "--capacity=0"], "capacity_factor must be above 0")
    fails(capsys, [*start, image, "--topk=0"], "--topk must be at least 1")
    fails(capsys, ["predict", tmp_path, image], "must hold a checkpoint, got none")


def test_unknown_keyword_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["predict", "--wings"])
    assert "usage: vmoe predict" in capsys.readouterr().err


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "vmoe_torch.cli", "train"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("vmoe train: data.root")
    assert "Traceback" not in done.stderr


def test_options_and_overrides_come_in_any_order(tmp_path, capsys):
    words = ["optim.lr=0.5", "--recipe", "fashion_mnist", "run.seed=7", "--print-config", "optim.lr=0.25"]
    for order in (words, [*words[3:5], *words[:3], words[5]], ["--print-config", *words[:4], words[5]]):
        assert main(["train", *order]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["run"]["seed"], printed["optim"]["lr"]) == (7, 0.25)
        assert printed["data"]["name"] == "fashion_mnist"
    assert main(["train", "data.name=fashion_mnist", "--resume", "run.device=gpu"]) == 2
    assert "run.device must be" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["train", "data.name=fashion_mnist", f"run.output={tmp_path}/cuda", "run.device=cuda"]) == 2
        assert "must be cpu or auto, as PyTorch sees no CUDA device, got cuda:0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", "optim.lr=1", "--wings", "run.seed=1"])
    assert "unrecognized arguments: --wings" in capsys.readouterr().err


def test_images_and_options_of_predict_come_in_any_order(trained, image, capsys):
    assert main(["predict", "--topk=1", str(trained), str(image), "--device", "cpu", str(image)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.kwargs.in_chans=4", "model.kwargs.in_chans must be one of 1, 3, got 4"),
        ("model.kwargs.patch_size=0", "model.kwargs.patch_size must be at least 1, got 0"),
        ("model.kwargs.drop_path_rate=2", "model.kwargs.drop_path_rate must be in [0, 1), got 2.0"),
        ("model.kwargs.global_pool=", "model.kwargs.global_pool must be text that is not empty, got ''"),
        ("model.kwargs.batch_priority=perhaps", "model.kwargs.batch_priority must be bool, got 'perhaps'"),
        ("model.name=vmoe_s33", "model.name must be a timm model, got 'vmoe_s33'; did you mean"),
        ("optim.name=adahessian", "optim.name must be an optimiser that needs no second derivative"),
        ("optim.momentum=0.9", "optim.momentum must be left out with optim.name=adamw, which has none, got 0.9"),
        ("schedule.warmup_epochs=99", "the schedule's warm-up must be shorter"),
        ("data.auto_augment=foo", "data.auto_augment must be a policy of timm's"),
        ("data.batch_size=100000", "batch_size must be at most"),
        ("lr=1e-3", "did you mean optim.lr?"),
        ("num_experts=4", "did you mean model.kwargs.num_experts?"),
        ("run.device=cuda:x", "run.device must be auto, cpu, cuda or cuda:N"),
        ("run.output=", "run.output must be text that is not empty"),
    ],
)
def test_train_names_the_key_that_is_wrong(tmp_path, capsys, change, message):
    fails(capsys, arguments(tmp_path / "run", change), message)


def test_commands_refuse_options_out_of_their_range(trained, image, capsys):
    data = ["--data", "fashion_mnist"]
    for command in (["eval", trained, *data], ["analyze", trained, *data, "--out=o"], ["budget", trained, *data]):
        fails(capsys, [*command, "--device=gpu"], "--device must be auto, cpu, cuda or cuda:N, got gpu")
        fails(capsys, [*command, "--workers=-1"], "--workers must be at least 0, got -1")
        fails(capsys, [*command, "--batch-size=0"], "must be at least 1")
    fails(capsys, ["fewshot", trained, *data, "--device=gpu"], "--device must be auto, cpu, cuda or cuda:N, got gpu")
    fails(capsys, ["predict", trained, image, "--device=tpu"], "--device must be auto, cpu, cuda or cuda:N")
    fails(capsys, ["budget", trained, *data, "--flops=nan"], "--flops must be above 0 and finite, got nan")
    fails(capsys, ["convert", "a", "b.safetensors", "--shards=0"], "--shards must be at least 1, got 0")
    fails(capsys, ["plan", "test_vmoe", "--gpus=0", "--ep=1", "--batch-size=1"], "--gpus must be at least 1, got 0")


def test_every_numeric_option_has_a_rule():
    # Their ranges are those of the model's layers, which check them by their own names.
    layers = {"--capacity", "--k", "--shots", "--mean", "--threshold"}
    for name, command in cli.parsers()[1].items():
        ruled = {option for option, _ in command.get_default("rules") or ()}
        numeric = {
            action.option_strings[0] for action in command._actions if action.type in (int, float, integers, numbers)
        }
        assert numeric - layers <= ruled, name


def test_damaged_checkpoints_end_in_one_line(trained, tmp_path, capsys):
    for content in (b"", b"PK\x03\x04", b"no checkpoint at all" * 99):
        (tmp_path / "best.pt").write_bytes(content)
        fails(capsys, ["eval", tmp_path / "best.pt", "--data=fashion_mnist"], "best.pt")


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (torch.OutOfMemoryError("no room"), 2)]
)
def test_what_ends_a_command_has_its_exit_code(monkeypatch, capfd, error, code):
    def ends(*args, **kwargs):
        raise error

    monkeypatch.setattr(eval_command, "open_model", ends)
    assert main(["eval", "model", "--data=fashion_mnist"]) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert len(err.splitlines()) == (0 if code == 141 else 1)


def test_fault_of_ours_keeps_its_traceback(monkeypatch):
    def ends(*args, **kwargs):
        raise IndexError("ours")

    monkeypatch.setattr(eval_command, "open_model", ends)
    with pytest.raises(IndexError, match="ours"):
        main(["eval", "model", "--data=fashion_mnist"])


def test_traceback_is_shown_where_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("VMOE_TRACEBACK", "1")
    assert main(["train", "optim.lr=-1", "data.name=fashion_mnist"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("Traceback")
    assert err[-1] == "vmoe train: optim.lr must be at least 0 and finite, got -1.0"
    monkeypatch.setenv("VMOE_TRACEBACK", "0")
    assert main(["train", "optim.lr=-1", "data.name=fashion_mnist", "--traceback"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("onnx", ": pip install -e '.[export]' from a clone of vmoe-torch\n"),
        ("av.video", ": pip install -e '.[video]' "),
        ("x", "\n"),
    ],
)
def test_package_that_is_not_there_is_named(monkeypatch, capsys, name, advice):
    def ends(*args, **kwargs):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(eval_command, "open_model", ends)
    fails(
        capsys, ["eval", "model", "--data=fashion_mnist"], f"needs the package {name}, which is not installed{advice}"
    )


def test_interrupted_command_says_so_in_one_line(trained):
    # Whole processes: torch's import, too, may be what the user interrupts.
    command = [sys.executable, "-m", "vmoe_torch.cli", "eval", str(trained), "--data=fashion_mnist", "--batch-size=1"]
    loading = "import signal, sys, os; signal.signal(signal.SIGINT, signal.default_int_handler); "
    loading += (
        "sys.orig_argv = ['vmoe', '/bin/vmoe']; from vmoe_torch import cores; os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", loading], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "vmoe: interrupted\n")

    # A test may run where SIGINT is ignored.
    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        # Late enough for Python to have its handler, before 1,000 forwards are done.
        time.sleep(4.0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith(": interrupted")
    assert "Traceback" not in err


def test_recipe_that_is_nearly_there_is_suggested(capsys):
    fails(capsys, ["train", "--recipe=fashionmnist"], "did you mean fashion_mnist")


def test_key_twice_in_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "c.json").write_text('{"optim": {"lr": 1, "lr": 2}}')
    fails(capsys, ["train", f"--config={tmp_path}/c.json"], "every key must be there once, got lr twice")
