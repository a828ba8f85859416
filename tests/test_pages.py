"""The built pages: no warning, nothing fetched from elsewhere, and what every public field is."""

import ast
import dataclasses
import fcntl
import importlib
import inspect
import os
import pydoc
import re
import subprocess
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import PUBLIC

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the pages, built once for all of pytest's processes; what the build said is in build.log."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "pages"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "build.log").exists():
            built = subprocess.run(
                [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"},
            )
            (folder / "build.log").write_text(f"{built.returncode}\n{built.stdout}{built.stderr}", encoding="utf-8")
    return folder / "site"


def test_pages_build_without_a_warning(site):
    code, said = (site.parent / "build.log").read_text(encoding="utf-8").split("\n", 1)
    assert code == "0", said
    assert "WARNING" not in said, said
    assert "How V-MoE works" in (site / "index.html").read_text(encoding="utf-8")
    # A page fetches nothing from elsewhere.
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|link)[^>]*>", page.read_text(encoding="utf-8"))
        fetched = [tag for tag in tags if re.search(r"(?:src|href)=\"?https?://", tag) and "canonical" not in tag]
        assert fetched == [], page.name


def has_fields(cls: Any) -> bool:
    """Whether a class is one of ours that is its fields: a dataclass, a named tuple or a dict of options."""
    ours = isinstance(cls, type) and cls.__module__.startswith(("vmoe_torch", "vmoe_kernels"))
    return ours and (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields") or typing.is_typeddict(cls))


def _definition(cls: type) -> ast.ClassDef:
    return ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]


def documented_fields(cls: type) -> dict[str, str]:
    """What stands under each public field of a class itself, empty where nothing does."""
    node, found = _definition(cls), {}
    for field, below in zip(node.body, [*node.body[1:], None]):
        if isinstance(field, ast.AnnAssign) and not field.target.id.startswith("_"):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            found[field.target.id] = " ".join(text.split()) if text else ""
    return found


def reachable() -> set[type]:
    """Our classes with fields that the public packages hold, or that their functions and classes take or give."""
    left = []
    for package in map(importlib.import_module, PUBLIC):
        left += [getattr(package, name) for name in getattr(package, "__all__", ())]
    seen, found = set(), set()
    while left:
        thing = left.pop()
        if id(thing) in seen or inspect.ismodule(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, Mapping):
            left += map(type, thing.values())
        elif isinstance(thing, type):
            if has_fields(thing):
                found.add(thing)
                # Python forgets the bases of a dict of options.
                names = map(ast.unparse, _definition(thing).bases)
                left += filter(has_fields, (getattr(sys.modules[thing.__module__], name, None) for name in names))
            if thing.__module__.startswith(("vmoe_torch", "vmoe_kernels")):
                left += _annotated(thing)
                members = (getattr(member, "fget", member) for member in vars(thing).values())
                left += (kind for member in filter(inspect.isfunction, members) for kind in _annotated(member))
        elif callable(thing):
            left += _annotated(inspect.unwrap(thing))
    return found


def _annotated(thing: Any) -> Iterator[type]:
    for kind in typing.get_type_hints(thing).values():
        yield from _classes(kind)


def _classes(kind: Any) -> Iterator[type]:
    if isinstance(kind, type):
        yield kind
    for inner in kind if isinstance(kind, list) else typing.get_args(kind):
        yield from _classes(inner)


def test_every_field_of_a_public_class_has_a_docstring():
    """Also where no public package leads to the class; those two go where the compile report is."""
    for path in sorted((*(ROOT / "src").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"))):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])
                cls = getattr(importlib.import_module(name), node.name)
                if has_fields(cls):
                    empty = [field for field, text in documented_fields(cls).items() if not text]
                    assert empty == [], f"{name}.{node.name}"
                    twice = "Attributes:" in (cls.__doc__ or "")
                    assert not twice, f"{name}.{node.name} describes its fields in its own docstring, too"


def test_every_public_field_is_on_a_page(site):
    classes = reachable()
    names = {cls.__name__ for cls in classes}
    # The roots and leaves of what a user meets.
    assert names >= {"Config", "AlarmsConfig", "Routing", "RouterOutput", "Gpu", "LayerSetting"}
    assert names >= {"RoutingOptions", "VisionTransformerOptions", "Weights", "Origin", "Leaf", "Figure", "Flops"}
    shown: dict[tuple[type, str], str] = {}
    for page in (site / "api").rglob("*.html"):
        _, *parts = re.split(r'<h\d id="([\w.]+)" class="doc doc-heading">', page.read_text(encoding="utf-8"))
        for path, html in zip(parts[::2], parts[1::2]):
            owner, _, name = path.rpartition(".")
            if owner.rpartition(".")[2] in names:
                contents = html.partition('<div class="doc doc-contents')[2].partition(">")[2].partition("</div>")[0]
                shown[pydoc.locate(owner), name] = " ".join(unescape(re.sub(r"<[^>]*>", "", contents)).split())
    for cls in classes:
        for name, text in documented_fields(cls).items():
            assert text, f"{cls.__qualname__}.{name}"
            assert shown.get((cls, name)) == text.replace("`", ""), f"{cls.__qualname__}.{name}"
