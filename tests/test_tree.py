"""What is committed is committed once."""

import hashlib
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_no_two_files_have_equal_bytes():
    """Over 1 KB; a link to another file is no copy of it."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    seen: dict[str, Path] = {}
    for path in files:
        if path.is_file() and not path.is_symlink() and path.stat().st_size > 1024:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert digest not in seen, f"{path} is {seen[digest]} again"
            seen[digest] = path
