"""Commands and the images they are given: which ones count, how many, broken ones, and names of every kind."""

import json
import shutil

import pytest
from PIL import Image

from tests.test_cli import fails
from tests.tiny import small_config
from vmoe_torch.cli import main
from vmoe_torch.commands.images import open_images
from vmoe_torch.commands.sources import open_model
from vmoe_torch.train import train


@pytest.fixture
def images(image_folder, tmp_path):
    """A copy of the folder with `train` and `val`."""
    return shutil.copytree(image_folder, tmp_path / "images")


@pytest.fixture(scope="module")
def strange_run(tmp_path_factory):
    """Folder of a run on classes with names of every kind, and the folder of the images."""
    root = tmp_path_factory.mktemp("strange")
    names = ("coin $1_$5", "犬", "كلب", "a|b <i>&", "line\nbreak", "\x1b[31mred", "b\udce9", "x" * 200, "_under", "𒀀")
    for split in ("train", "val"):
        for number, name in enumerate(names):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for image in range(8):
                Image.new("L", (28, 28), 20 * number + image).save(folder / f"{image}.png")
    changes = ("data.name=folder", f"data.root={root}/images", "run.max_updates=1", "data.crop_pct=1.0")
    train(small_config(root / "run").override(*changes))
    return root / "run", root / "images"


def run(capsys, *arguments):
    """(stdout, stderr) of a command that ends well."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("split", ["valid", "validation", "test", "Val"])
def test_eval_takes_the_split_and_says_so(run_folder, images, split, capsys):
    (images / "val").rename(images / split)
    (images / "train" / "bag" / "more.png").write_bytes((images / "train" / "bag" / "0.png").read_bytes())
    _, err = run(capsys, "eval", run_folder, "--data", images)
    assert f"data: {images}/{split}: 12 images in 3 classes" in err
    _, err = run(capsys, "eval", run_folder, "--data", images, "--split=train")
    assert f"data: {images}/train: 13 images in 3 classes" in err


@pytest.mark.parametrize(
    "command", [["eval"], ["analyze", "--out"], ["fewshot"], ["budget", "--flops=0.9", "--split=val"]]
)
def test_without_its_split_a_command_takes_nothing_else(run_folder, images, tmp_path, command, capsys):
    (images / "val").rename(images / "holdout")
    arguments = [command[0], run_folder, "--data", images, *command[1:]]
    fails(capsys, [*arguments, *([tmp_path / "out"] if command[-1] == "--out" else [])], "it holds holdout, train")


def test_every_command_says_which_images_it_took(run_folder, images, tmp_path, capsys):
    _, err = run(capsys, "fewshot", run_folder, "--data", images, "--shots=1")
    assert f"shots from: {images}/train: 12 images in 3 classes" in err
    assert f"test images: {images}/val: 12 images in 3 classes" in err
    _, err = run(capsys, "budget", run_folder, "--data", images, "--flops=0.9")
    assert f"data: {images}/train: 12 images in 3 classes" in err
    (images / "val" / "bag" / "notes.txt").touch()
    _, err = run(capsys, "analyze", run_folder, "--data", images, "--out", tmp_path / "out", "--capacity=1")
    assert "passed over 1 files that are no images by their ending (.txt 1)" in err
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{images}/val: 12 images in 3 classes; passed over 1 files" in page
    _, err = run(capsys, "eval", run_folder, "--data=fashion_mnist", "--batch-size=500")
    assert "data: fashion_mnist (test): 2,000 images in 10 classes" in err


def test_max_broken_is_the_same_for_every_command(run_folder, images, tmp_path, capsys):
    for number in (0, 2, 3):
        (images / "val" / "bag" / f"{number}.png").write_bytes(b"no image")
    for name in ("eval", "fewshot", "analyze", "budget"):
        options = {
            "analyze": ["--out", tmp_path / "out", "--capacity=1", "--images=12"],
            "budget": ["--flops=0.9", "--split=val"],
            "fewshot": ["--shots=1"],
        }
        arguments = [name, run_folder, "--data", images, *options.get(name, [])]
        assert main([str(argument) for argument in (*arguments, "--max-broken=2")]) == 2
        *warnings, error = capsys.readouterr().err.splitlines()
        assert "max_broken must be at least the number of broken images, 3: " in error
        assert all(f"bag/{number}.png cannot be read" in error for number in (0, 2, 3))
        assert len(warnings) == 2
        _, err = run(capsys, *arguments, "--max-broken=3")
        assert err.count("cannot be read") == 3
        assert "skipped, 3 of max_broken=3" in err
        fails(capsys, [*arguments, "--max-broken=-1"], "--max-broken must be at least 0, got -1")


def test_broken_images_are_left_out_of_the_numbers(run_folder, images, tmp_path, capsys):
    whole = shutil.copytree(images, tmp_path / "whole")
    (images / "val" / "bag" / "0.png").write_bytes(b"no image")
    (whole / "val" / "bag" / "0.png").unlink()
    rows = []
    for folder, options in ((images, ["--max-broken=1"]), (whole, [])):
        run(capsys, "eval", run_folder, "--data", folder, f"--out={tmp_path}/x.json", "--batch-size=12", *options)
        rows.append(json.loads((tmp_path / "x.json").read_text()))
    assert rows[0] == rows[1]
    assert rows[0][0]["images"] == 11


def test_shots_that_are_broken_are_replaced(run_folder, images, tmp_path, capsys):
    whole = shutil.copytree(images, tmp_path / "whole")
    for number in (0, 1):
        (images / "train" / "bag" / f"{number}.png").write_bytes(b"no image")
    run(capsys, "fewshot", run_folder, "--data", images, "--shots=2", "--seeds=3", "--max-broken=2")
    # All that is left of the class are these shots.
    for number in (0, 1):
        (whole / "train" / "bag" / f"{number}.png").unlink()
    texts = []
    for folder, options in ((images, ["--max-broken=2"]), (whole, [])):
        run(capsys, "fewshot", run_folder, "--data", folder, "--shots=4", f"--out={tmp_path}/x.json", *options)
        texts.append([row["accuracy"] for row in json.loads((tmp_path / "x.json").read_text())])
    assert texts[0] == texts[1]


def test_predict_turns_and_names_all_broken(run_folder, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6
    gradient = Image.linear_gradient("L").resize((28, 28))
    gradient.save(tmp_path / "lying.png", exif=exif)
    gradient.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    gradient.save(tmp_path / "other.png")
    names = [tmp_path / f"{name}.png" for name in ("lying", "upright", "other")]
    out, _ = run(capsys, "predict", run_folder, *names, "--topk=10")
    lines = out.splitlines()
    assert lines[1:11] == lines[12:22] != lines[23:]
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"no image")
    arguments = ["predict", run_folder, tmp_path / "a", tmp_path / "b"]
    fails(capsys, arguments, f"image {tmp_path}/a cannot be read", f"image {tmp_path}/b cannot be read")


def test_images_are_turned_as_the_run_that_trained(run_folder, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "bag").mkdir()
    Image.new("L", (30, 20)).save(tmp_path / "bag" / "0.png", exif=exif)
    source = open_model(run_folder)
    assert open_images(source, tmp_path)[0][0].size == (30, 20)
    object.__setattr__(source.config.data, "exif", True)
    assert open_images(source, tmp_path)[0][0].size == (20, 30)


def test_no_name_of_a_class_ends_a_command(strange_run, tmp_path, capsys):
    folder, images = strange_run
    arguments = [folder, "--data", images]
    out, err = run(capsys, "analyze", *arguments, "--out", tmp_path / "out", "--capacity=1", "--batch-size=16")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in page + out + err
    image = images / "val" / "b\udce9" / "0.png"
    out, _ = run(capsys, "predict", folder, image, "--topk=10")
    lines = out.splitlines()
    assert len(lines) == 11
    assert lines[0].endswith(r"b\xe9/0.png")
    for name in ("coin $1_$5", "犬", "كلب", r"line\nbreak", r"\x1b[31mred", r"b\xe9"):
        assert any(f"  {name} " in line for line in lines)
    rows = (tmp_path / "x.csv", tmp_path / "x.json")
    for file in rows:
        shutil.copytree(images, tmp_path / "y\udce9", dirs_exist_ok=True)
        run(capsys, "fewshot", folder, "--data", tmp_path / "y\udce9", "--shots=1", "--out", file)
        assert "xe9" in file.read_text() or "udce9" in file.read_text()
        run(capsys, "eval", folder, "--data", tmp_path / "y\udce9", "--out", file)
