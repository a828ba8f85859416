"""These tests run the Triton kernels on the CPU, in Triton's interpreter."""

import pytest

from vmoe_kernels import _impl

if not _impl.INTERPRET:
    pytest.exit("tests/interpreter needs TRITON_INTERPRET=1 in the environment (`make test` sets it)", returncode=4)
