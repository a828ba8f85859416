"""These tests run under ttsem: their launches are executed on the CPU."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("tests.semantics.plugin"):
        pytest.exit("tests/semantics needs -p tests.semantics.plugin (`make test-semantics` has it)", returncode=4)
