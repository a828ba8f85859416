"""A run on typefaces: built from its configuration, distorted in training alone, and resumed to equal bits."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from vmoe_torch.train import build_data, build_model, build_transforms, train

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture
def on_typefaces(tiny, tmp_path, monkeypatch):
    """Five updates of 16 images an epoch, on 40 letters of two fonts; validated on a third."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, names in (("train", ("DejaVuSans", "cmr10")), ("val", ("DejaVuSerif",))):
        (tmp_path / "fonts" / split).mkdir(parents=True)
        for name in names:
            shutil.copy(SHIPPED / f"{name}.ttf", tmp_path / "fonts" / split)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmn"
    (tmp_path / "fonts" / "characters.txt").write_text(letters)
    return tiny.override(
        "data.name=typefaces",
        f"data.root={tmp_path / 'fonts'}",
        "data.kwargs.side=32",
        "data.mixup=0",
        "data.auto_augment=null",
        "data.random_erasing=0",
    )


def test_typefaces_run_is_distorted_in_training_only(on_typefaces):
    data = build_data(on_typefaces.data, "L")
    assert len(data.class_names) == 40
    assert data.train[0][0].size == (32, 32)
    training, evaluation = build_transforms(on_typefaces.data, build_model(on_typefaces.model, 40))
    image = data.val[0][0]
    assert training(image).shape == evaluation(image).shape == (1, 28, 28)
    assert torch.equal(evaluation(image), evaluation(image))
    assert not torch.equal(training(image), training(image))
    plain, _ = build_transforms(on_typefaces.override("data.augment=false").data, build_model(on_typefaces.model, 40))
    assert torch.equal(plain(image), plain(image))


def test_typefaces_run_resumes_to_equal_bits(on_typefaces, tmp_path):
    whole = train(on_typefaces)
    assert whole.updates == 10
    stopped = on_typefaces.override(f"run.output={tmp_path / 'stopped'}", "data.workers=1")
    train(stopped.override("run.max_updates=3"))
    again = train(stopped, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert np.array_equal(tensor.numpy(), again.model.state_dict()[name].numpy()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.kwargs.side=3", "side must be at least 8 pixels, got 3"),
        ("data.kwargs.sides=32", "data.kwargs: .*sides"),
        ("data.name=folder", r"data.kwargs must be empty for data.name=folder, got \{'side': 32\}"),
        ("data.root=null", "data.root must name the folder"),
    ],
)
def test_typefaces_run_refuses(on_typefaces, change, message):
    with pytest.raises(ValueError, match=message):
        train(on_typefaces.override(change))
