"""Numbers: every kind is checked in one way, and what is refused is named."""

import numpy as np
import pytest
import torch

import vmoe_kernels as vk
from vmoe_kernels.common import checks

T, K, E, D, H = 6, 1, 3, 4, 5
X, WEIGHT = torch.randn(T, D), torch.randn(E, D)
SLOTS = torch.arange(T, dtype=torch.int32).view(T, K)
EXPERTS, GATES = torch.zeros(T, K, dtype=torch.int32), torch.rand(T, K)
WEIGHTS = (torch.randn(E, H, D), torch.randn(E, H), torch.randn(E, D, H), torch.randn(E, D))
SEED = torch.tensor(3)


def _router(**changes):
    return vk.router(X, WEIGHT, **{"num_selected_experts": 1} | changes)


def _slots(**changes):
    return vk.assign_slots(EXPERTS, GATES, **{"num_experts": E, "capacity": 2} | changes)


def _moe(**changes):
    return vk.moe_mlp(X, SLOTS, GATES, *WEIGHTS, **{"rows_per_expert": 2} | changes)


def _capacity(**changes):
    return vk.compute_capacity(**{"num_tokens": 8, "num_experts": 4, "capacity_factor": 1.0} | changes)


def _rows(**changes):
    return vk.rows_per_expert(**{"num_tokens": 8, "group_size": 4, "capacity": 2, "last_capacity": 2} | changes)


def _experts(**changes):
    return vk.expert_mlp(X.view(E, 2, D), *WEIGHTS, **changes)


INTEGERS = [
    (_router, "num_selected_experts"),
    (_router, "group_size"),
    (_slots, "num_experts"),
    (_slots, "group_size"),
    (_slots, "capacity"),
    (_slots, "last_capacity"),
    (_moe, "rows_per_expert"),
    (_capacity, "num_tokens"),
    (_capacity, "num_experts"),
    (_capacity, "num_selected_experts"),
    (_capacity, "multiple_of"),
    (_rows, "num_tokens"),
    (_rows, "group_size"),
    (_rows, "capacity"),
    (_rows, "last_capacity"),
    (lambda num_rows: vk.dispatch(X, SLOTS, num_rows), "num_rows"),
    (lambda group_size: vk.num_groups(8, group_size), "group_size"),
]
NUMBERS = [
    (lambda noise_std: _router(noise_std=noise_std, seed=SEED), "noise_std"),
    (lambda drop: _moe(drop=drop, seed=SEED), "drop"),
    (lambda drop: _experts(drop=drop, seed=SEED), "drop"),
    (_capacity, "capacity_factor"),
]


@pytest.mark.parametrize("value", [2.0, 1.5, True, False, "2", torch.tensor(2), np.float64(2.0), np.True_, -4, [2]])
@pytest.mark.parametrize(("call", "name"), INTEGERS)
def test_integers_are_integers(call, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got "):
        call(**{name: value})


@pytest.mark.parametrize(("call", "name"), INTEGERS)
def test_numpy_integers_are_integers(call, name):
    value = 6 if name == "num_rows" else 2
    torch.testing.assert_close(call(**{name: np.int64(value)}), call(**{name: value}), equal_nan=True)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), -0.5, True, "0.1", None, torch.tensor(0.1)]
)
@pytest.mark.parametrize(("call", "name"), NUMBERS)
def test_numbers_are_finite_numbers(call, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got "):
        call(**{name: value})


@pytest.mark.parametrize(("call", "name"), NUMBERS)
def test_numpy_numbers_are_numbers(call, name):
    for value in (np.float32(0.5), np.float64(0.5)):
        torch.testing.assert_close(call(**{name: value}), call(**{name: 0.5}))


@pytest.mark.parametrize("value", [1, 0, "no", None, 1.0, torch.tensor(True)])
def test_flags_are_flags(value):
    with pytest.raises(ValueError, match=r"^batch_priority must be True or False, got "):
        _slots(batch_priority=value)
    assert torch.equal(_slots(batch_priority=np.True_), _slots(batch_priority=True))


@pytest.mark.parametrize(
    "seed", [5, 5.0, -1, None, torch.tensor(5.0), torch.tensor([5]), torch.tensor(5, dtype=torch.int32), True]
)
@pytest.mark.parametrize(
    "call",
    [
        lambda seed: _router(noise_std=1.0, seed=seed),
        lambda seed: _moe(drop=0.1, seed=seed),
        lambda seed: _experts(drop=0.1, seed=seed),
    ],
)
def test_seed_is_an_int64_tensor(call, seed):
    with pytest.raises(ValueError, match=r"^seed must be a 0-dim int64 tensor when (noise_std|drop) > 0, got "):
        call(seed=seed)


def test_seed_is_on_the_device_of_the_data():
    with pytest.raises(ValueError, match=r"^seed must be on cpu like the data, got meta"):
        _moe(drop=0.1, seed=torch.tensor(3, device="meta"))


def test_rows_fit_in_int32():
    message = r"^the buffer must have fewer than 2\*\*31 rows, got "
    rows = 2**31
    for call in (
        lambda: vk.assign_slots(EXPERTS, GATES, num_experts=8, capacity=10**9),
        lambda: vk.assign_slots(EXPERTS, GATES, num_experts=8, capacity=10**9, impl="reference"),
        lambda: vk.assign_slots(EXPERTS, GATES, num_experts=2, capacity=1, last_capacity=2**30, group_size=4),
        lambda: torch.ops.vmoe.assign_slots(EXPERTS, GATES, 8, 6, 10**9, 10**9, False, "max"),
        lambda: vk.route(X, WEIGHT, num_selected_experts=1, capacity=2**30),
        lambda: vk.dispatch(X, SLOTS, rows),
        lambda: vk.combine(torch.empty(1, 1).expand(rows, 1), SLOTS, GATES),
        lambda: _moe(rows_per_expert=2**30),
        lambda: vk.expert_mlp(torch.empty(1, 1, 1).expand(E, 2**30, D), *WEIGHTS),
        lambda: vk.rows_per_expert(2**20, 2**10, 2**21, 1),
        lambda: vk.compute_capacity(2**20, 1, 1e6),
        lambda: vk.compute_capacity(2**20, 1, 1e308),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # The largest that fits.
    slots = vk.assign_slots(EXPERTS + 1, GATES, num_experts=2, capacity=2**30 - 1)
    assert slots[-1].item() == 2**30 - 1 + T - 1


def test_random_numbers_are_counted_in_32_bits():
    many = torch.empty(1, 1).expand(2**31, 1)
    with pytest.raises(ValueError, match=r"^tokens times experts must be fewer than 2\*\*32 .*, got 6442450944"):
        vk.router(many, torch.empty(E, 1), num_selected_experts=1, noise_std=1.0, seed=SEED)
    wide = (torch.empty(1, 1, 1).expand(1, 2**16, 1), None, torch.empty(1, 1, 1).expand(1, 1, 2**16), None)
    with pytest.raises(ValueError, match=r"^rows times hidden width of an expert must be fewer than 2\*\*32 "):
        vk.moe_mlp(X[:, :1], SLOTS, GATES, *wide, rows_per_expert=2**16, drop=0.1, seed=SEED)
    with pytest.raises(ValueError, match=r"^slots must hold fewer than 2\*\*31 choices, got 2147483648"):
        vk.dispatch(many, torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1), 1)


def test_symbolic_sizes_pass():
    program = torch.export.export(
        _Dispatch(),
        (X, SLOTS),
        dynamic_shapes={"x": {0: torch.export.Dim("tokens")}, "slots": {0: torch.export.Dim("tokens")}},
    )
    assert torch.equal(program.module()(X[:3], SLOTS[:3]), vk.dispatch(X[:3], SLOTS[:3], 6))


class _Dispatch(torch.nn.Module):
    def forward(self, x, slots):
        return vk.dispatch(x, slots, x.shape[0] * 2)


def test_a_number_is_given_back_as_pythons():
    assert type(checks.check_number("x", np.float64(1.5), "a number")) is float
    assert type(checks.check_integer("x", np.int32(2), 0)) is int
    assert type(checks.check_flag("x", np.False_)) is bool
