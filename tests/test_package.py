"""The package as it is built and installed: what the files hold, what an index shows, what a type checker finds."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import vmoe_torch
from vmoe_torch.extras import EXTRAS

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; print([b.build_wheel('w'), b.build_sdist('s'), b.build_editable('e')])"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folders w, s and e with a wheel, an sdist and an editable wheel of a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    ours = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for folder in ("src", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ours)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    # setuptools would put a file of this name into an sdist.
    (tree / "tests").mkdir()
    shutil.copy(__file__, tree / "tests")
    result = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return tree


@pytest.fixture
def metadata(built) -> str:
    (wheel,) = (built / "w").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return file.read(name).decode()


def _sources() -> set[str]:
    roots = (ROOT / "src", ROOT / "kernels")
    return {str(path.relative_to(root)) for root in roots for path in root.rglob("*.py") if "egg-info" not in str(path)}


def test_wheel_holds_both_packages_and_nothing_else(built):
    (wheel,) = (built / "w").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    images = {f"{which}-{kind}-ubyte.gz" for which in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")}
    data = {f"vmoe_torch/data/fashion_mnist/{name}" for name in images | {"LICENSE"}}
    assert names == _sources() | data | {"vmoe_torch/py.typed", "vmoe_kernels/py.typed"}


def test_sdist_builds_the_same_wheel(built, tmp_path):
    (sdist,) = (built / "s").glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert not (tree / "tests").exists()
    for name in ("LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "constraints.txt"):
        assert (tree / name).is_file(), name
    code = "from setuptools import build_meta as b; b.build_wheel('w')"
    result = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    held = []
    for folder in (built / "w", tree / "w"):
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            held.append({name: file.read(name) for name in file.namelist() if not name.endswith("RECORD")})
    assert held[0] == held[1]


def test_editable_install_is_a_path_that_type_checkers_read(built):
    (wheel,) = (built / "e").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".pth"))
        lines = file.read(name).decode().splitlines()
        assert not any(name.endswith(".py") for name in file.namelist()), "an import hook"
    assert lines == [str((built / root).resolve()) for root in ("src", "kernels")]


def test_metadata_is_valid_and_complete(metadata):
    parsed = Metadata.from_email(metadata, validate=True)
    assert parsed.name == "vmoe-torch"
    assert str(parsed.version) == vmoe_torch.__version__
    assert str(parsed.requires_python) == ">=3.11"
    assert parsed.license_expression == "Apache-2.0 AND MIT"
    assert parsed.author or parsed.author_email
    assert "timm" in parsed.keywords
    assert "Typing :: Typed" in parsed.classifiers
    assert {"Repository", "Issues", "Changelog", "Paper"} <= set(parsed.project_urls)
    assert {"train", "export", "docs", "dev", "gcs", "interop"} <= set(parsed.provides_extra)


def test_version_is_written_once():
    written = [
        path.relative_to(ROOT)
        for path in (ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "CITATION.cff", *(ROOT / "src").rglob("*.py"))
        if vmoe_torch.__version__ in path.read_text(encoding="utf-8")
    ]
    assert written == [Path("src/vmoe_torch/__init__.py")]


def test_index_page_has_no_relative_link(metadata):
    message = message_from_string(metadata)
    assert message["Description-Content-Type"] == "text/markdown"
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", message.get_payload())
    assert all(target.startswith(("https://", "#")) for _, target in links)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    pictures = [target for image, target in links if image]
    assert len(pictures) == (ROOT / "README.md").read_text(encoding="utf-8").count("![") > 0
    for target in pictures:
        assert (ROOT / target.removeprefix(f"{repository}/raw/HEAD/")).is_file(), target


def test_extras_are_what_an_error_advises():
    """All but those that only develop the package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    modules = {"open_clip_torch": "open_clip"}
    wanted = {"fontTools": "train"}
    for extra in extras.keys() - {"docs", "dev"}:
        names = (re.match(r"[\w-]+", each)[0] for each in extras[extra] if not each.startswith("vmoe-torch["))
        wanted |= {modules.get(name, name): extra for name in names}
    assert wanted == EXTRAS


def test_constraints_pin_every_tool_of_the_extra_interop():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["interop"]
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    named = dict(re.fullmatch(r"([\w-]+)>=(\S+)", each).groups() for each in extra if ">=" in each)
    assert named.keys() <= pins.keys()
    for name, bound in named.items():
        assert pins[name].startswith(bound), f"{name}: what is known to work is {pins[name]}, got >={bound}"


def test_citation_is_the_paper():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert text.startswith("cff-version: 1.2.0\n")
    top = re.findall(r"^([\w-]+):", text, re.MULTILINE)
    assert {"message", "title", "authors", "preferred-citation"} <= set(top)
    assert "title: Scaling Vision with Sparse Mixture of Experts" in text
    assert text.count("family-names:") == text.count("given-names:") == 8
