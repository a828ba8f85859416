"""The router's long sums are as exact as a library's though a GPU adds term after term, as NumPy does not."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from tests.helpers.routing import router_inputs
from vmoe_kernels import router


@pytest.fixture(autouse=True)
def products_term_by_term(monkeypatch):
    """A product is one running sum that starts at its third operand, as on CUDA cores."""

    def create_dot(a, b, acc, *_):
        terms = np.concatenate([acc.data[:, None], a.data[:, :, None] * b.data], axis=1)
        return TensorHandle(np.add.accumulate(terms, axis=1)[:, -1], acc.dtype.scalar)

    monkeypatch.setattr(interpreter_builder, "create_dot", create_dot)


def test_router_sums_a_wide_token():
    x, weight = router_inputs((64, 64, 1280, 8, 1), torch.float32, torch.float32, "cpu")
    exact = x.double() @ weight.double().t()
    error = (router(x, weight, num_selected_experts=1, impl="triton").logits - exact).abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()
