"""Tiles without a filled row: how many products the experts' GEMMs multiply, counted in the interpreter."""

from functools import partial

import pytest
import torch
from triton.runtime import interpreter

from vmoe_kernels import assign_dropless_slots, dropless_mlp, moe_mlp
from vmoe_kernels.testing import make_experts

# 8 tokens of 32 columns, two experts of 128 hidden columns: tiles are 128 x 128, steps 32 columns long.
TOKENS, WIDTH, HIDDEN = 8, 32, 128


@pytest.fixture
def products(monkeypatch):
    """A list that has an element for each product of two tiles."""
    done, multiply = [], interpreter.InterpreterBuilder.create_dot

    def count(self, *operands):
        done.append(1)
        return multiply(self, *operands)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", count)
    return done


def _inputs() -> dict[str, torch.Tensor]:
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float16)
    return {"x": x, "gates": torch.rand(TOKENS, 1), **make_experts((2, WIDTH, HIDDEN, WIDTH), torch.float16)}


@pytest.mark.parametrize("rows", [128, 512])
def test_capacity_beyond_the_load_costs_no_product(products, rows):
    """Each expert has a row of four tokens, in its first tile; the first GEMM takes a step, the second four."""
    slots = torch.tensor([[expert * rows + place] for expert in (0, 1) for place in range(4)], dtype=torch.int32)
    moe_mlp(**_inputs(), slots=slots, rows_per_expert=rows, impl="triton")
    assert len(products) == 2 * (1 + 4)


def test_the_gradient_of_hidden_activations_takes_no_product_of_an_empty_tile(products):
    counts = []
    for rows in (128, 512):
        slots = torch.tensor([[expert * rows + place] for expert in (0, 1) for place in range(4)], dtype=torch.int32)
        inputs = _inputs()
        y = moe_mlp(**{**inputs, "x": inputs["x"].requires_grad_()}, slots=slots, rows_per_expert=rows, impl="triton")
        products.clear()
        y.sum().backward()
        counts.append(len(products))
    # What grows are the weight gradients, which walk over the rows of an expert, 32 at a time.
    assert counts[1] - counts[0] == 2 * 2 * (512 - 128) // 32


def test_a_dropless_buffer_is_multiplied_up_to_its_end(products):
    """One expert has all tokens; the tile of the other, for which there is room, stays as it is. A step is 64 long."""
    experts = torch.zeros(TOKENS, 1, dtype=torch.int32)
    slots, spans = assign_dropless_slots(experts, num_experts=2)
    op = partial(dropless_mlp, impl="triton", slots=slots, spans=spans)
    op(**_inputs())
    assert len(products) == 1 + 2
