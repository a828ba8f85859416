"""Every command of a benchmark that is written down anywhere names a module that is there, and options that it has."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A result's command is that of the commit it names.
WRITTEN = [
    path
    for name in ("README.md", "Makefile", "docs", "benchmarks", "src", "kernels")
    for path in (sorted((ROOT / name).rglob("*.*")) if (ROOT / name).is_dir() else [ROOT / name])
    if path.suffix in ("", ".md", ".py", ".sh") and ROOT / "benchmarks" / "results" not in path.parents
]
COMMANDS = {
    (module.rstrip("."), option)
    for path in WRITTEN
    for module, rest in re.findall(r"-m (benchmarks\.[\w.]+)([^`\n]*)", path.read_text(encoding="utf-8"))
    for option in ("--help", *re.findall(r"--[\w-]+", rest))
}
HAVE_NO_OPTIONS = {"benchmarks.compile.sanitize"}


@pytest.mark.parametrize("module", sorted({module for module, _ in COMMANDS}))
def test_commands_name_options_that_there_are(module, capsys):
    program = importlib.import_module(module)
    if hasattr(program, "__path__"):
        program = importlib.import_module(f"{module}.__main__")
    main = program.main
    if module in HAVE_NO_OPTIONS:
        return
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = set(re.findall(r"--[\w-]+", capsys.readouterr().out.replace(program.__doc__, "")))
    assert {option for name, option in COMMANDS if name == module} <= shown


def test_every_benchmark_with_a_command_is_in_the_table():
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        if '__name__ == "__main__"' in path.read_text() and name not in HAVE_NO_OPTIONS:
            assert f"`python -m {name}" in table, name
