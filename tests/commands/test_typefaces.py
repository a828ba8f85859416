"""Commands on fonts: what a run that learned from typefaces, and any other model, takes for images."""

import json
import shutil
from pathlib import Path

import matplotlib
import pytest
from fontTools.ttLib import TTFont

from tests.test_cli import fails
from tests.tiny import small_config
from vmoe_torch.cli import main
from vmoe_torch.commands.images import open_images
from vmoe_torch.commands.sources import open_model
from vmoe_torch.train import train

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# Each means something in a table, a page, a formula or a path.
CHARACTERS = "A$|<&_%\\*`'\"犬"


def font(name: str, path: Path) -> None:
    """One that matplotlib ships, with a kanji."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TTFont(SHIPPED / f"{name}.ttf") as opened:
        for table in opened["cmap"].tables:
            if table.isUnicode():
                table.cmap[ord("犬")] = table.cmap[ord("Q")]
        opened.save(path)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Two fonts to train on, one to validate."""
    root = tmp_path_factory.mktemp("fonts")
    for name in ("DejaVuSans", "DejaVuSerif"):
        font(name, root / "train" / f"{name}.ttf")
    font("DejaVuSansMono", root / "val" / "DejaVuSansMono.ttf")
    (root / "characters.txt").write_text(CHARACTERS, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def font_run(fonts, tmp_path_factory):
    """Folder of a run of one update."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    changes = ("data.name=typefaces", f"data.root={fonts}", "data.kwargs.side=30", "data.batch_size=8")
    train(small_config(folder).override(*changes, "run.max_updates=1"))
    return folder


def run(capsys, *arguments):
    """(stdout, stderr) of a command that ends well."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def test_eval_draws_fonts_as_the_run_did(font_run, fonts, tmp_path, capsys):
    _, err = run(capsys, "eval", font_run, "--data", fonts, f"--out={tmp_path}/x.json")
    assert f"data: {fonts}/val: 13 images in 13 classes" in err
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["images"] == 13
    source = open_model(font_run)
    assert open_images(source, fonts)[0][0].size == (30, 30)
    # The classes are the model's, whatever a folder says of its own; a folder without splits is taken as it is.
    other = shutil.copytree(fonts / "val", tmp_path / "fonts")
    (other / "characters.txt").write_text("犬Z", encoding="utf-8")
    images = open_images(source, other)
    assert images.class_names == tuple(CHARACTERS)
    assert images.labels().tolist() == list(range(13))
    assert len(open_images(source, fonts, ".")) == 39
    assert len(open_images(source, f"typefaces={fonts}", "train")) == 26
    fails(capsys, ["eval", font_run, "--data", fonts, "--split=none"], "must be a folder in", "it holds train, val")


def test_a_run_on_fonts_takes_images_too(font_run, tmp_path):
    source = open_model(font_run)
    for name in ("A", "犬"):
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        source_image = open_images(source, "fashion_mnist", own_labels=True)[0][0]
        source_image.save(tmp_path / "images" / "val" / name / "0.png")
    images = open_images(source, tmp_path / "images")
    assert images.labels().tolist() == [0, 12]


def test_fewshot_is_on_the_characters_of_the_folder(font_run, fonts, tmp_path, capsys):
    other = shutil.copytree(fonts, tmp_path / "fonts")
    (other / "characters.txt").write_text("XYZ犬")
    _, err = run(capsys, "fewshot", font_run, "--data", other, "--shots=1", f"--out={tmp_path}/x.json")
    assert f"shots from: {other}/train: 8 images in 4 classes" in err
    assert f"test images: {other}/val: 4 images in 4 classes" in err
    # Without a list, those of all fonts to learn from, though the others have more.
    (other / "characters.txt").unlink()
    for name in ("DejaVuSans", "DejaVuSerif"):
        (other / "train" / f"{name}.ttf").unlink()
    shutil.copy(SHIPPED / "cmr10.ttf", other / "train")
    _, err = run(capsys, "fewshot", font_run, "--data", other, "--shots=1")
    assert err.count("images in ") == 2
    classes = {line.partition(" images in ")[2].split()[0] for line in err.splitlines() if " images in " in line}
    assert len(classes) == 1


def test_fonts_are_for_every_model(run_folder, fonts, image_folder, tmp_path, monkeypatch, capsys):
    _, err = run(capsys, "fewshot", run_folder, "--data", f"typefaces={fonts}", "--shots=1")
    assert f"{fonts}/val: 13 images in 13 classes" in err
    fails(capsys, ["eval", run_folder, "--data", f"typefaces={fonts}"], "must be among the 10 expected")
    # Without the word they are no images.
    fails(capsys, ["eval", run_folder, "--data", fonts], "got no image; passed over")
    (tmp_path / "typefaces").symlink_to(image_folder)
    monkeypatch.chdir(tmp_path)
    assert len(open_images(open_model(run_folder), "typefaces")) == 12
    fails(capsys, ["eval", run_folder, "--data=typefaces="], "typefaces= does not exist")


def test_characters_are_names_in_every_report(font_run, fonts, tmp_path, capsys):
    run(capsys, "analyze", font_run, "--data", fonts, "--out", tmp_path / "out", "--capacity=1", "--batch-size=13")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{fonts}/val: 13 images in 13 classes" in page
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert found["class_names"] == list(CHARACTERS)
    open_images(open_model(font_run), fonts)[0][0].save(tmp_path / "a.png")
    out, _ = run(capsys, "predict", font_run, tmp_path / "a.png", "--topk=13")
    assert {line.split()[-2] for line in out.splitlines()[1:]} == set(CHARACTERS)
    _, err = run(capsys, "budget", font_run, "--data", fonts, "--flops=0.9")
    assert f"data: {fonts}/train: 26 images in 13 classes" in err
