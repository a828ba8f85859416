"""These tests run the Triton kernels on the CPU, in Triton's interpreter."""

import pytest

from vmoe_kernels.common import impl as _impl

if not _impl.INTERPRET:
    pytest.exit("tests/interpreter needs TRITON_INTERPRET=1 in the environment (`make test` sets it)", returncode=4)

from triton.runtime.interpreter import interpreter_builder


@pytest.fixture(autouse=True)
def programs_in_another_order(monkeypatch):
    """Runs the programs of a grid backwards from its middle: on a GPU none may count on another one's having run."""
    in_order = interpreter_builder.set_grid_idx

    def set_grid_idx(*indices):
        sizes = interpreter_builder.grid_dim
        in_order(*((size // 2 - index) % size for index, size in zip(indices, sizes)))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
