"""Puts the faults of mutations.py into copies of the kernels, one at a time, and runs under ttsem what must notice.

    python -m tests.semantics.mutate               all of them; exit status 1 if one is not noticed
    python -m tests.semantics.mutate 3 17          some, by their number in the table
    python -m tests.semantics.mutate --write ...   and writes what was found into tests/semantics/mutations.md

First the tests run on the kernels as they are, and must pass. A process that has PyTorch, Triton and ttsem in it makes
a child for each fault, so that a fault takes as long as its tests.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  (what the children would each import anew, here and below)
import ttsem.harness  # noqa: F401

from tests.semantics.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".md").with_name("mutations.md")
HEAD = """# Faults that the GPU tests notice under ttsem

Written by `python -m tests.semantics.mutate --write`: each fault of `mutations.py` is put into a copy of the kernels,
and its tests run. They pass on the kernels as they are.

| | kind | fault | file | noticed | by |
| --- | --- | --- | --- | --- | --- |
"""


def mutated(text: str, mutation: Mutation) -> str:
    """A file with the fault in it.

    Raises:
        ValueError: if the place of the fault is not there, or not the only one.
    """
    if text.count(mutation.before) != 1:
        raise ValueError(f"{mutation.file} must have {mutation.before!r} once, got {text.count(mutation.before)} times")
    return text.replace(mutation.before, mutation.after)


def _run_tests(kernels: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status and output of pytest in a child process that imports these kernels."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.path.insert(0, str(kernels))
            arguments = ["-p", "tests.semantics.plugin", "-p", "no:cacheprovider", "-p", "no:xdist", "-x", "--tb=short"]
            code = 3
            try:
                code = int(pytest.main([*arguments, *tests]))
                import vmoe_kernels

                assert Path(vmoe_kernels.__file__).is_relative_to(kernels), vmoe_kernels.__file__
            except BaseException as error:
                print(error)
                code = 3
            finally:
                sys.stdout.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read()


def _noticed_by(output: str) -> str:
    """What the first failing test says, in short; of a fault that ttsem sees, in which kernel it is."""
    line = next((line[1:].strip() for line in output.splitlines() if line.startswith("E  ")), "")
    fault = re.search(r"KernelFault: (kernel `\w+`)", line)
    return f"ttsem: a fault in {fault[1]}" if fault else f"values: {line.replace('|', '/')[:160]}"


def check(mutation: Mutation | None, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status of the tests with a fault (or with none), and what the first that fails says.

    Raises:
        RuntimeError: if pytest neither passed nor failed: a test is not there, or the kernels cannot be imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder).resolve() / "kernels"
        shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            path = kernels / "vmoe_kernels" / mutation.file
            path.write_text(mutated(path.read_text(), mutation))
        code, output = _run_tests(kernels, tests)
    if code not in (0, 1):
        raise RuntimeError(f"pytest must pass or fail, got exit status {code} of {tests}:\n{output}")
    return code, _noticed_by(output)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the rows into tests/semantics/mutations.md")
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="rows of the table (default: all)")
    options = parser.parse_args(arguments)
    numbers = options.numbers or range(1, len(MUTATIONS) + 1)
    chosen = [(number, MUTATIONS[number - 1]) for number in numbers]
    for tests in dict.fromkeys(mutation.tests for _, mutation in chosen):
        code, said = check(None, tests)
        if code:
            raise RuntimeError(f"tests must pass on the kernels as they are, got {tests}: {said}")
    rows = {}
    for number, each in chosen:
        code, said = check(each, each.tests)
        rows[number] = f"| {number} | {each.kind} | {each.what} | `{each.file}` | {('no', 'yes')[code]} | {said} |"
        print(rows[number], flush=True)
        if options.write:
            _write(rows)
    return 0 if all("| yes |" in row for row in rows.values()) else 1


def _write(rows: dict[int, str]) -> None:
    """Rows of the table in place of those of their numbers."""
    before = TABLE.read_text().splitlines() if TABLE.exists() else []
    known = {int(line.split("|")[1]): line for line in before if re.match(r"\| \d", line)}
    TABLE.write_text(HEAD + "".join(f"{row}\n" for _, row in sorted({**known, **rows}.items())))


if __name__ == "__main__":
    sys.exit(main())
