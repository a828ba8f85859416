"""The Triton kernels take tensors of any strides."""

import pytest

from tests.helpers.strides import OPS, check_strides


@pytest.mark.parametrize("op", OPS)
def test_op_takes_any_strides(op):
    check_strides(op)
