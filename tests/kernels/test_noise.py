"""The router's noise: Philox's words against integers of Python, and one draw for both directions on a CPU."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import vmoe_kernels as vk
from vmoe_kernels.common.groups import group_parts
from vmoe_kernels.common.philox import philox_normal, philox_words, uniform

MASK = 2**32 - 1
SEEDS = (0, 1234, 2**31 - 2, 2**62 + 12345678901, -5)


def philox(seed: int, block: int) -> tuple[int, int, int, int]:
    """The words of a block of Philox-4x32-10 (Salmon et al. 2011), in exact integers."""
    c, k = (block, 0, 0, 0), (seed & MASK, seed >> 32 & MASK)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = (b >> 32 ^ c[1] ^ k[0], b & MASK, a >> 32 ^ c[3] ^ k[1], a & MASK)
        k = ((k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK)
    return c


def uniforms(words: np.ndarray) -> np.ndarray:
    """As Triton has it: a word with the top bit set is complemented."""
    signed = words.astype(np.uint32).view(np.int32)
    return np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_words_of_all_blocks(seed):
    blocks = torch.cat((torch.arange(75), torch.tensor([2**31 + 7, 2**32 - 1]))).view(7, 11)
    want = np.array([philox(seed, block) for block in blocks.flatten().tolist()])
    got = torch.stack(philox_words(torch.tensor(seed), blocks), -1).view(77, 4)
    assert (got & MASK).tolist() == want.tolist()
    assert torch.equal(uniform(got), torch.from_numpy(uniforms(want)))


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 10])
def test_normals_are_made_of_the_words_of_their_blocks(columns, by_column):
    seed, rows, blocks = SEEDS[3], 9, -(-columns // 4)
    got = philox_normal(torch.tensor(seed), rows, columns, by_column=by_column)
    assert got.dtype == torch.float32
    assert (got.t() if by_column else got).is_contiguous()
    for row in range(rows):
        for column in range(columns):
            radii_and_angles = uniforms(np.array(philox(seed, row * blocks + column // 4)))
            radius, angle = radii_and_angles.reshape(2, 2)[:, column % 2].astype(np.float64)
            wave = np.sin if column % 4 >= 2 else np.cos
            want = np.sqrt(-2 * np.log(max(radius, 1e-7))) * wave(2 * np.pi * angle)
            assert abs(got[row, column].item() - want) < 5e-6, (row, column)


def test_noise_is_normal_independent_and_reproducible():
    seed = torch.tensor(1234567890123)
    noise = philox_normal(seed, 50_000, 8)
    assert (noise.mean(0).abs() < 0.02).all()
    # Also of their squares, as the two of a pair share their radius.
    for values in (noise, noise.square()):
        correlation = values.t().corrcoef()
        assert (correlation - torch.eye(8)).abs().max() < 0.02
    quantiles = torch.tensor([-2.326348, -1.0, 0.0, 1.0, 2.326348])
    shares = torch.stack([(noise < q).float().mean(0) for q in quantiles])
    want = torch.special.ndtr(quantiles).unsqueeze(1)
    assert (shares - want).abs().max() < 0.01
    assert torch.equal(noise[:100], philox_normal(seed, 100, 8))
    assert torch.equal(noise, philox_normal(seed, 50_000, 8, by_column=True))
    assert not torch.equal(noise[:100], philox_normal(seed + 1, 100, 8))


def test_backward_needs_no_second_draw():
    x, weight = torch.randn(24, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        out = vk.router(x, weight, num_selected_experts=2, group_size=10, noise_std=1.0, seed=torch.tensor(7))
        (out.gates.square().sum() + out.load.square().sum()).backward()
    # The logarithm is of the draw alone.
    assert sum(event.name in ("aten::log", "aten::log_") for event in seen.events()) == 1


@pytest.mark.parametrize("experts", [6, 18])
def test_router_op_draws_what_it_is_not_given(experts):
    x, weight, seed = torch.randn(24, 8), torch.randn(experts, 8), torch.tensor(7)
    noise = torch.ops.vmoe.router_noise(seed, 24, experts)
    assert torch.equal(noise, philox_normal(seed, 24, experts))
    drawn = torch.ops.vmoe.router(x, weight, 2, 10, 1.0, seed)
    given = torch.ops.vmoe.router(x, weight, 2, 10, 1.0, seed, noise)
    assert all(torch.equal(a, b) for a, b in zip(drawn, given))
    torch.library.opcheck(torch.ops.vmoe.router_noise, (seed, 24, experts))
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
