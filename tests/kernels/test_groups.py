"""Groups of tokens, the last one possibly smaller: their number, rows and sums; and the tuples behind flat schemas."""

import pytest
import torch

import vmoe_kernels as vk
from vmoe_kernels.common.groups import group_mean, group_sizes, group_sum, split_groups
from vmoe_kernels.experts.types import Activation, ExpertWeights, bundle


@pytest.mark.parametrize(("tokens", "size"), [(0, 3), (1, 1), (2, 3), (3, 3), (7, 3), (9, 3)])
def test_groups_cover_every_token_once(tokens, size):
    sizes = [min(size, tokens - first) for first in range(0, tokens, size)]
    assert vk.num_groups(tokens, size) == len(sizes)
    assert vk.rows_per_expert(tokens, size, 5, 2) == sum(5 if each == size else 2 for each in sizes)
    parts = split_groups(tokens, size)
    assert [i for part, _ in parts for i in range(part.start, part.stop)] == list(range(tokens))
    assert [part.stop - part.start for part, _ in parts] == [tokens // size * size, tokens % size]
    assert [groups for _, groups in parts] == [tokens // size, 1]

    values = torch.randn(tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = values.split(size) if tokens else []
    assert group_sizes(values, size).flatten().tolist() == sizes
    for got, want in (
        (group_sum(values, size), [group.sum(0) for group in groups]),
        (group_mean(values, size), [group.mean(0) for group in groups]),
    ):
        torch.testing.assert_close(got, torch.stack(want) if want else values.new_empty(0, 4))


@pytest.mark.parametrize("op", ["expert_mlp", "expert_mlp_backward", "moe_mlp", "moe_mlp_backward"])
def test_schemas_name_the_fields_of_the_tuples(op):
    """What a compiled or exported program holds: flat arguments, in the order in which the tuples are made of them."""
    names = [argument.name for argument in getattr(torch.ops.vmoe, op).default._schema.arguments]
    first = names.index("fc1_weight")
    assert tuple(names[first : first + 4]) == ExpertWeights._fields
    first = names.index("activation")
    assert names[first : first + 3] == ["activation", *Activation._fields[1:]]


def test_a_bundle_leaves_out_what_nothing_needs():
    weight, seed = torch.ones(2, 4, 3), torch.tensor(1)
    weights, activation = bundle(weight, None, weight.mT, None, "relu", 0.0, seed)
    assert activation == ("relu", 0.0, None)
    assert activation.keep(0, 5, 4) is None
    assert bundle(*weights, "relu", 0.5, seed)[1].keep(0, 5, 4).shape == (5, 4)
    assert [None if each is None else each.shape for each in weights.of(1)] == [(4, 3), None, (3, 4), None]
    assert [tuple(each.shape) for each in weights.new_gradients()] == [(2, 4, 3), (0,), (2, 3, 4), (0,)]
