"""Typefaces, on the fonts that matplotlib ships: DejaVu has every character here but 日."""

import pickle
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from vmoe_torch.data import described, glyphs, typefaces
from vmoe_torch.data.distort import Distort
from vmoe_torch.data.loader import EpochSampler, training_loader
from vmoe_torch.data.typefaces import Typefaces

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
CHARACTERS = "AajQ§日"


@pytest.fixture
def root(tmp_path) -> Path:
    for split, names in (("train", ("DejaVuSans", "DejaVuSerif-Bold")), ("val", ("STIXGeneral",))):
        (tmp_path / split / "deeper").mkdir(parents=True)
        for name in names:
            shutil.copy(SHIPPED / f"{name}.ttf", tmp_path / split / "deeper")
    (tmp_path / "characters.txt").write_text(" A a j\nQ§日\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_typefaces_items_are_the_characters_that_a_font_has(root, cache):
    data = Typefaces(root, cache=cache)
    assert data.class_names == tuple(CHARACTERS)
    assert [face.name for face in data.faces] == ["DejaVu Sans Book", "DejaVu Serif Bold"]
    # Neither font has the kanji: what it draws in its place is no picture of one.
    assert data.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert data.face_numbers.tolist() == [0] * 5 + [1] * 5
    image, label = data[7]
    assert (image.size, image.mode, label) == ((48, 48), "L", 2)
    assert Typefaces(root, mode="RGB", cache=cache)[0][0].mode == "RGB"


def test_typefaces_draw_in_the_middle_and_inside(root, cache):
    data = Typefaces(root, cache=cache, side=40)
    for image, _ in (data[index] for index in range(len(data))):
        rows, columns = np.nonzero(np.asarray(image) > 32)
        for place in (rows, columns):
            assert place.min() >= 1
            assert place.max() <= 38
            assert abs(place.min() + place.max() - 39) <= 2


def test_typefaces_of_another_size_and_of_other_characters(root, cache):
    small, large = (Typefaces(root, cache=cache, side=side) for side in (16, 64))
    assert small[0][0].size == (16, 16)
    assert large[0][0].size == (64, 64)
    other = Typefaces(root, characters="Qq", cache=cache, side=16)
    assert other.class_names == ("Q", "q")
    assert np.array_equal(np.asarray(other[0][0]), np.asarray(small[3][0]))


def test_typefaces_without_a_list_have_what_all_faces_share(root, cache):
    (root / "characters.txt").unlink()
    names = Typefaces(root, cache=cache, side=8).class_names
    assert set("AajQ§") <= set(names)
    assert "日" not in names
    assert not any(name.isspace() for name in names)
    assert list(names) == sorted(names)


def test_typefaces_are_drawn_once(root, cache, monkeypatch):
    first = Typefaces(root, cache=cache)

    def no_drawing(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(typefaces, "draw", no_drawing)
    again = Typefaces(root, cache=cache)
    assert all(np.array_equal(np.asarray(a[0]), np.asarray(b[0])) for a, b in zip(first, again))
    with pytest.raises(AssertionError, match="drawn again"):
        Typefaces(root, cache=cache, side=47)


def test_typefaces_leave_out_faces_that_draw_the_same(root, cache):
    shutil.copy(SHIPPED / "DejaVuSans.ttf", root / "train" / "Other.ttf")
    data = Typefaces(root, cache=cache)
    assert [face.path.name for face in data.faces] == ["Other.ttf", "DejaVuSerif-Bold.ttf"]
    assert len(data) == 10


def test_typefaces_leave_nothing_when_they_are_interrupted(root, cache, monkeypatch):
    def interrupted(file, pictures):
        file.write(b"part")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Typefaces(root, cache=cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00", None])
def test_typefaces_draw_anew_what_is_damaged(root, cache, damage):
    want = [np.asarray(image) for image, _ in Typefaces(root, cache=cache)]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:200] if damage is None else damage)
    assert all(np.array_equal(np.asarray(image), w) for (image, _), w in zip(Typefaces(root, cache=cache), want))


def test_typefaces_go_without_a_cache_that_cannot_be_written(root, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert len(Typefaces(root, cache=blocked)) == 10
    assert blocked.read_text() == "not a folder"


def test_typefaces_of_a_collection(root, cache, tmp_path):
    from fontTools.ttLib import TTFont
    from fontTools.ttLib.ttCollection import TTCollection

    collection = TTCollection()
    collection.fonts = [TTFont(SHIPPED / f"{name}.ttf") for name in ("DejaVuSans", "DejaVuSansMono")]
    (tmp_path / "both" / "train").mkdir(parents=True)
    collection.save(tmp_path / "both" / "train" / "both.ttc")
    data = Typefaces(tmp_path / "both", characters="Aa", cache=cache)
    assert [(face.name, face.index) for face in data.faces] == [("DejaVu Sans Book", 0), ("DejaVu Sans Mono Book", 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "folder of fonts .*test does not exist"),
        ({"characters": "AbA"}, "named once each, got 'A' twice"),
        ({"characters": ["A", "ab"]}, "single characters that draw something, got 'ab'"),
        ({"characters": "A "}, "single characters that draw something, got ' '"),
        ({"characters": ""}, "at least one, got none"),
        ({"characters": "日本"}, "must have some of the characters"),
        ({"side": 7}, "side must be at least 8 pixels, got 7"),
        ({"side": 32.0}, "side must be at least 8 pixels, got 32.0"),
    ],
)
def test_typefaces_refuse(root, cache, change, message):
    with pytest.raises(ValueError, match=message):
        Typefaces(root, cache=cache, **change)


def test_typefaces_name_a_font_that_cannot_be_read(root, cache):
    (root / "train" / "broken.otf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"font .*broken\.otf cannot be read"):
        Typefaces(root, cache=cache)
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold font files \(\.ttf"):
        Typefaces(root, "empty", cache=cache)


def test_typefaces_tell_what_they_passed_over(root, cache):
    shutil.copy(SHIPPED / "DejaVuSans.ttf", root / "train" / "Other.ttf")
    for hidden in ("._Other.ttf", ".git/a.ttf", "__MACOSX/b.ttf"):
        (root / "train" / hidden).parent.mkdir(exist_ok=True)
        (root / "train" / hidden).write_bytes(b"no font")
    data = Typefaces(root, cache=cache)
    assert data.empty == ["日"]
    assert data.notices == [
        "passed over 1 faces that draw all as an earlier one does",
        "no face has 1 of 6 characters: 日",
    ]
    assert described(data) == f"10 images in 6 classes; {'; '.join(data.notices)}"
    (root / "characters.txt").write_text("A日A", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^characters of .*characters\.txt must be named once each, got 'A' twice"):
        Typefaces(root, cache=cache)


def test_typefaces_digest_is_of_fonts_characters_and_size(root, cache, tmp_path):
    digest = Typefaces(root, cache=cache).digest()
    moved = shutil.copytree(root, tmp_path / "moved", ignore=shutil.ignore_patterns("cache"))
    assert Typefaces(moved, cache=tmp_path / "file").digest() == digest
    assert Typefaces(root, cache=cache, characters="AajQ日§").digest() != digest
    assert Typefaces(root, cache=cache, side=47).digest() != digest
    shutil.copy(SHIPPED / "DejaVuSerif.ttf", moved / "train" / "deeper" / "DejaVuSerif-Bold.ttf")
    assert Typefaces(moved, cache=cache).digest() != digest


def test_typefaces_travel_without_their_pictures(root, cache):
    data = Typefaces(root, cache=cache, side=200)
    sent = pickle.dumps(data)
    assert len(sent) < 10_000
    again = pickle.loads(sent)
    assert all(np.array_equal(np.asarray(again[i][0]), np.asarray(data[i][0])) for i in range(len(data)))
    # Without a cache they are in memory, and travel.
    (root / "no").touch()
    assert len(pickle.loads(pickle.dumps(Typefaces(root, cache=root / "no")))) == 10


def test_glyph_that_would_not_fit_is_drawn_smaller():
    face = next(glyphs.faces_of(SHIPPED / "DejaVuSans.ttf"))
    (wide,) = glyphs.draw(face, ["⟹"], 32)
    columns = np.nonzero(wide.any(axis=0))[0]
    assert 24 <= columns.max() - columns.min() + 1 <= 32


def test_distortions_are_the_seeds_and_the_items_alone(root, cache):
    data, distort = Typefaces(root, cache=cache), Distort((24, 24))

    def to_tensor(image):
        return torch.from_numpy(np.array(distort(image)))

    def batches(first_update: int) -> list:
        sampler = EpochSampler(len(data), 5, seed=3)
        sampler.set_position(1, first_update)
        return [images.numpy() for images, _ in training_loader(data, to_tensor, sampler, 0, False)]

    whole = batches(0)
    assert whole[0].shape == (5, 24, 24)
    assert np.array_equal(whole[1], batches(1)[0])
    assert not np.array_equal(whole[0], whole[1])


def test_distortion_of_nothing_is_a_plain_resize(root, cache):
    image, _ = Typefaces(root, cache=cache)[0]
    still = Distort((48, 48), degrees=0, shear=0, scale=(1, 1), shift=0, stroke=0, blur=0, contrast=1, noise=0)
    assert np.array_equal(np.asarray(still(image)), np.asarray(image))


def test_distortions_of_a_strength(root, cache):
    image, _ = Typefaces(root, cache=cache)[0]
    assert np.array_equal(np.asarray(Distort.of_strength((48, 48), 0)(image)), np.asarray(image))
    assert vars(Distort.of_strength((48, 48), 1)) == vars(Distort((48, 48)))
    half = Distort.of_strength((48, 48), 0.5)
    assert (half.degrees, half.scale, half.contrast, half.stroke) == (6.0, (0.875, 1.05), 0.75, 0.25)
    with pytest.raises(ValueError, match=r"strength must be in 0\.\.2, got 3"):
        Distort.of_strength((48, 48), 3)


def test_distortions_each_change_the_picture(root, cache):
    image, _ = Typefaces(root, cache=cache)[3]
    none = {"degrees": 0, "shear": 0, "scale": (1, 1), "shift": 0, "stroke": 0, "blur": 0, "contrast": 1, "noise": 0}
    assert len(none) == 8
    for name, value in (
        ("degrees", 30),
        ("shear", 0.5),
        ("scale", (0.5, 0.6)),
        ("shift", 0.3),
        ("stroke", 1),
        ("blur", 4),
        ("contrast", 0.1),
        ("noise", 50),
    ):
        changed = Distort((48, 48), **{**none, name: value})
        assert not np.array_equal(np.asarray(changed(image)), np.asarray(image)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": -1}, r"noise must be in 0\.\.255, got -1"),
        ({"degrees": float("nan")}, r"degrees must be in 0\.\.180, got nan"),
        ({"scale": (1.2, 0.8)}, "scale must be two numbers"),
    ],
)
def test_distortions_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        Distort((32, 32), **change)
