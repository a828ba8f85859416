"""What a test needs of the extra `interop`."""

from types import ModuleType

import pytest


def needs(library: str) -> ModuleType:
    """The library, imported; without it the test, or the whole file, is skipped, and the reason names the extra."""
    return pytest.importorskip(library, reason=f"{library} is not installed: it is in the extra `interop`")
