"""Fetches timm's sdist of the installed version and runs its tests/test_models.py on our models.

    python tests/timm_suite/run.py [FOLDER] [PYTEST ARGS ...]

The wheel of timm has no tests, so they are fetched once into FOLDER (default .timm-tests) and never committed.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import timm

ROOT = Path(__file__).resolve().parents[2]


def fetch(folder: Path) -> Path:
    """The unpacked sdist of the installed timm, downloaded where it is not there yet.

    Raises:
        SystemExit: if the sdist has no tests/test_models.py.
        subprocess.CalledProcessError: if pip cannot download it.
    """
    name = f"timm-{timm.__version__}"
    source = folder / name
    tests = source / "tests" / "test_models.py"
    if not tests.is_file():
        archive = folder / f"{name}.tar.gz"
        if not archive.is_file():
            download = ["pip", "download", f"timm=={timm.__version__}", "--no-deps", "--no-binary", ":all:", "-q"]
            subprocess.run([sys.executable, "-m", *download, "-d", str(folder)], check=True)
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    if not tests.is_file():
        raise SystemExit(f"timm's sdist must hold tests/test_models.py, got {archive} without it")
    return source


def main(arguments: list[str]) -> int:
    """Returns pytest's exit status."""
    folder = Path(arguments[0] if arguments and not arguments[0].startswith("-") else ROOT / ".timm-tests").resolve()
    arguments = arguments[1:] if arguments and not arguments[0].startswith("-") else arguments
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    source = fetch(folder)
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    # timm leaves tests out on GitHub's small machines; here all of them run.
    environment = {name: value for name, value in os.environ.items() if name != "GITHUB_ACTIONS"}
    environment.update(PYTHONPATH=path, VMOE_TIMM_WEIGHTS=str(weights))
    command = [sys.executable, "-m", "pytest", "-p", "timm_suite.plugin", "-p", "no:cacheprovider", "-q"]
    command += ["-c", str(source / "pyproject.toml"), "--durations=5", *arguments, str(source / "tests/test_models.py")]
    return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
