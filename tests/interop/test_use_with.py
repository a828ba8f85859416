"""docs/use-with.md: every example runs, on its own, where its libraries are installed."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.interop.requirement import needs
from tests.test_docs import PAGES, blocks

TEXT = PAGES["docs/use-with.md"].read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
EXAMPLES = [
    pytest.param(block.code, id=f"{section.splitlines()[0]} {number}")
    for section in SECTIONS
    for number, block in enumerate(block for block in blocks(section) if block.language == "python")
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path, monkeypatch):
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for library in {name.partition(".")[0] for name in names} - {"timm", "torch", "vmoe_torch"}:
            needs(library)
    monkeypatch.chdir(tmp_path)
    # A class that an example defines is looked up by its module.
    monkeypatch.setitem(sys.modules, "example", type(sys)("example"))
    namespace = sys.modules["example"].__dict__
    exec(compile(code, "docs/use-with.md", "exec"), namespace)


def test_page_names_every_library_of_the_extra():
    root = Path(__file__).parents[2]
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["interop"]
    tested = TEXT + "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for requirement in extra:
        name = re.match(r"[\w-]+", requirement)[0].removesuffix("_torch")
        assert name == "vmoe-torch" or name in tested, name
