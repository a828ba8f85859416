"""Triton's interpreter does arithmetic on bfloat16's bits: refused, with what to do instead."""

import pytest
import torch

from vmoe_torch.layers import MoeMlp


@pytest.mark.parametrize("router", ["top_experts", "expert_choice"])
def test_interpreter_refuses_bfloat16(router):
    options = {"num_experts": 4, "router": router, "noise_std": 0.0}
    layer = MoeMlp(8, **options).bfloat16()
    x = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype must be float16 or float32 under TRITON_INTERPRET=1, got bfloat16"):
        layer(x)
    assert MoeMlp(8, impl="reference", **options).bfloat16()(x).isfinite().all()


def test_interpreter_refuses_autocast_to_bfloat16():
    layer = MoeMlp(8, num_experts=4)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="under TRITON_INTERPRET=1"):
        layer(torch.randn(2, 4, 8))
