"""README and docs: every program runs, every command is one the tools know, links lead somewhere."""

import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from vmoe_torch import cli
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import Config

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
# Their commands are run in order with their Python, as a reader would.
RUN = {"docs/tutorial.md"}
# Examples that need the extra `interop`, each a program of its own: tests/interop runs them.
APART = {"docs/use-with.md"}
# What is neither run nor parsed, and why.
ELSEWHERE = {
    r"pip install .*": "installs the package that is under test",
    r"(VMOE_\w+=\S+ )?python train.py --device-modules vmoe_torch.timm_train .*": "needs a checkout of timm's scripts",
    r"python -m vmoe_torch.run validate.py .*": "needs a checkout of timm's scripts",
}
PUBLIC = (
    "vmoe_torch",
    *(f"vmoe_torch.{room}" for room in ("analyze", "budget", "checkpoints", "data", "evaluate", "layers", "models")),
    *(f"vmoe_torch.{room}" for room in ("export", "parallel", "recipes", "train")),
    "vmoe_kernels",
)


@dataclass(frozen=True)
class Block:
    """A block of code: fenced, with its language, or indented, which has none."""

    language: str
    code: str

    @property
    def commands(self) -> list[str]:
        """Lines of a shell, continued ones joined; none if the block is something else."""
        lines = re.sub(r"\\\n\s*", "", self.code).splitlines()
        lines = [re.split(r"\s{2,}#", line)[0].strip() for line in lines if line.strip()]
        first = lines[0].split()[0] if lines else ""
        shell = self.language in ("sh", "bash") or (not self.language and first in COMMANDS)
        return lines if shell else []


def blocks(text: str) -> list[Block]:
    """All blocks of a page in order."""
    pattern = r"^```(\w*)\n(.*?)^```|((?:^ {4}[^\n]*\n)(?:^ {4}[^\n]*\n|^\n(?= {4}))*)"
    return [
        Block(found[1] or "", found[2] if found[3] is None else re.sub("^ {4}", "", found[3], flags=re.MULTILINE))
        for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


def _parsed(words: list[str]) -> None:
    """A command of `vmoe`: its options are known, and for a run every key and value."""
    options = cli.parser().parse_args(words)
    if options.command == "train":
        config = load_recipe(options.recipe) if options.recipe else Config()
        config.override(*options.overrides)


def _torchrun(words: list[str]) -> None:
    start = words.index("-m")
    assert words[start + 1] == "vmoe_torch.cli", words
    _parsed(words[start + 2 :])


def _python(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words
        for option in words[2:]:
            if option.startswith("--"):
                assert option in Path(importlib.util.find_spec(words[1]).origin).read_text(), words
    else:
        assert (ROOT / words[0]).is_file(), words


def _make(words: list[str]) -> None:
    for target in words:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


def _bash(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), words


COMMANDS = {"vmoe": _parsed, "torchrun": _torchrun, "python": _python, "make": _make, "bash": _bash, "pip": None}


@pytest.mark.parametrize(
    "page", [page for page, path in PAGES.items() if "```python" in path.read_text() and page not in APART]
)
def test_programs_run(page, tmp_path, monkeypatch, capsys):
    """The Python of a page is one program; what it needs of a launcher is that of `torchrun --nproc-per-node 1`."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "0")
    if "init_process_group" not in PAGES[page].read_text():
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    namespace = {"__name__": "__main__"}
    try:
        for block in blocks(PAGES[page].read_text(encoding="utf-8")):
            if block.language == "python":
                exec(compile(block.code, page, "exec"), namespace)
            elif page in RUN:
                for command in block.commands:
                    program, *words = shlex.split(command)
                    assert program == "vmoe", command
                    assert cli.main(words) == 0, f"{command}: {capsys.readouterr().err}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_known(page):
    for block in blocks(PAGES[page].read_text(encoding="utf-8")):
        for command in block.commands:
            if any(re.fullmatch(pattern, command) for pattern in ELSEWHERE):
                continue
            program, *words = shlex.split(command)
            assert program in COMMANDS, f"{page}: {command}"
            try:
                COMMANDS[program](words)
            except (SystemExit, ValueError) as error:
                raise AssertionError(f"{page}: {command}: {error}") from error


def test_every_block_is_of_a_kind_that_is_checked():
    for page, path in PAGES.items():
        for block in blocks(path.read_text(encoding="utf-8")):
            assert block.language in ("", "python", "sh"), f"{page}: {block.language}"
            assert block.language != "" or "import " not in block.code, f"{page}: Python must be fenced: {block.code}"


@pytest.mark.parametrize("page", PAGES)
def test_code_fits_the_page(page):
    """What is longer is hidden behind a scroll bar."""
    lines = [line for block in blocks(PAGES[page].read_text(encoding="utf-8")) for line in block.code.splitlines()]
    assert [line for line in lines if len(line) > 85] == []


@pytest.mark.slow
def test_tables_of_models_are_what_the_code_says():
    path = ROOT / "docs" / "make_tables.py"
    spec = importlib.util.spec_from_file_location("make_tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, f"python {path.relative_to(ROOT)} writes them anew"


def test_pages_open_with_what_an_expert_is():
    """K, C and BPR are said before they are used, in the same words."""
    for page in ("README.md", "docs/index.md"):
        text = PAGES[page].read_text(encoding="utf-8")
        said = text.index("hold many small networks, the **experts**")
        assert said < min(text.index(word) for word in ("K", "capacity", "BPR", "choosing.md"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGES[page].read_text(encoding="utf-8")):
        assert (PAGES[page].parent / link).exists(), link


def test_api_pages_have_every_public_name():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").iterdir())
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    documented = {name.rpartition(".")[2] for name in shown}
    for package in PUBLIC:
        module = importlib.import_module(package)
        names = getattr(module, "__all__", None) or ["load_recipe", "recipe_names"]
        for name in names:
            if not hasattr(getattr(module, name), "__path__"):
                assert f"{package}.{name}" in shown or name in documented, f"{package}.{name} has no place in docs/api"
