"""The router's noise: Philox's words against integers of Python, and one draw for both directions on a CPU."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import vmoe_kernels as vk
from vmoe_kernels.common.groups import group_parts
from vmoe_kernels.common.philox import philox_bits, philox_normal, uniform

MASK = 2**32 - 1


def philox(seed: int, count: int) -> list[tuple[int, int]]:
    """The first two words of Philox-4x32-10 (Salmon et al. 2011), in exact integers."""
    words = []
    for counter in range(count):
        c, k = (counter, 0, 0, 0), (seed & MASK, seed >> 32 & MASK)
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = (b >> 32 ^ c[1] ^ k[0], b & MASK, a >> 32 ^ c[3] ^ k[1], a & MASK)
            k = ((k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK)
        words.append(c[:2])
    return words


@pytest.mark.parametrize("seed", [0, 1234, 2**31 - 2, 2**62 + 12345678901, -5])
def test_philox_words_and_normals(seed):
    words = np.array(philox(seed, 77), dtype=np.uint32)
    got = torch.stack(philox_bits(torch.tensor(seed), 77), 1)
    assert (got & MASK).tolist() == words.tolist()
    # As Triton has it: a word with the top bit set is complemented.
    signed = words.view(np.int32)
    floats = np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)
    assert torch.equal(uniform(got), torch.from_numpy(floats))
    first, second = floats.astype(np.float64).T
    want = np.sqrt(-2 * np.log(np.maximum(first, 1e-7))) * np.cos(2 * np.pi * second)
    np.testing.assert_allclose(philox_normal(torch.tensor(seed), 77).numpy(), want, atol=5e-6)


def test_backward_needs_no_second_draw():
    x, weight = torch.randn(24, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        out = vk.router(x, weight, num_selected_experts=2, group_size=10, noise_std=1.0, seed=torch.tensor(7))
        (out.gates.square().sum() + out.load.square().sum()).backward()
    # The logarithm is of the draw alone.
    assert sum(event.name in ("aten::log", "aten::log_") for event in seen.events()) == 1


def test_router_op_draws_what_it_is_not_given():
    x, weight, seed = torch.randn(24, 8), torch.randn(6, 8), torch.tensor(7)
    noise = torch.ops.vmoe.router_noise(seed, 24 * 6)
    assert torch.equal(noise, philox_normal(seed, 24 * 6))
    drawn = torch.ops.vmoe.router(x, weight, 2, 10, 1.0, seed)
    given = torch.ops.vmoe.router(x, weight, 2, 10, 1.0, seed, noise)
    assert all(torch.equal(a, b) for a, b in zip(drawn, given))
    torch.library.opcheck(torch.ops.vmoe.router_noise, (seed, 30))
    torch.library.opcheck(torch.ops.vmoe.router, (x, weight, 2, 10, 1.0, seed, noise))


@pytest.mark.parametrize("size", [1, 4, 5, 9])
@pytest.mark.parametrize("by_experts", [False, True])
def test_group_parts_go_with_their_tokens(size, by_experts):
    groups = -(-7 // size)
    per_group = torch.arange(groups * 2.0).view(groups, 2)
    values = torch.zeros(2, 7).t() if by_experts else torch.zeros(7, 2)
    for part, each in group_parts(values, per_group, size):
        part += each
    assert values.tolist() == [per_group[token // size].tolist() for token in range(7)]


def test_expert_out_of_reach_has_no_load():
    weight = torch.tensor([[0.0], [100.0], [-100.0]])
    options = {"num_selected_experts": 1, "noise_std": 1.0, "seed": torch.tensor(7)}
    load = vk.router(torch.ones(2, 1), weight, **options).load
    assert load[0, 1] > 0
    assert load[0, ::2].tolist() == [0.0, 0.0]
    assert vk.router(torch.full((2, 1), torch.nan), weight, **options).load.isnan().all()
