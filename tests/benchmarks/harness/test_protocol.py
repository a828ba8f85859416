"""How things are measured: interleaved runs, paired ratios, and no number for a wrong result."""

import pytest
import torch

from benchmarks.harness.protocol import Samples, measure, peak_cpu_memory, relative_error, require_close, with_gradients

CPU = torch.device("cpu")


def test_measure_runs_variants_in_turn():
    order = []
    samples = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, budget=0.0, min_runs=3)
    # Two warm-up runs each come first.
    assert "".join(order) == "aabb" + "ab" * 3
    assert {len(each.seconds) for each in samples.values()} == {3}


def test_measure_keeps_to_its_budget():
    samples = measure({"a": lambda: torch.randn(1000).sort()}, CPU, budget=1e9)
    assert len(samples["a"].seconds) == 200


def test_samples_pair_the_runs_of_a_round():
    a, b = Samples((1.0, 20.0, 3.0)), Samples((2.0, 40.0, 6.0))
    assert a.over(b).seconds == (0.5, 0.5, 0.5)
    assert a.median == 3.0
    assert a.quantile(0.2) == pytest.approx(1.8)


def test_require_close_allows_twice_the_eager_error():
    exact = {"out": torch.ones(100, dtype=torch.float64)}
    eager, twice, more = ({"out": torch.full((100,), 1.0 + error)} for error in (1e-3, 1.9e-3, 2.2e-3))
    require_close(twice, eager, exact)
    with pytest.raises(RuntimeError, match=r"out must be within 2.0e-03 of float64, got 2.2e-03: not timed"):
        require_close(more, eager, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_relative_error_is_infinite_for_what_is_no_number(bad):
    got = torch.ones(4)
    got[1] = bad
    assert relative_error(got, torch.ones(4)) == float("inf")
    assert relative_error(torch.ones(3), torch.ones(4)) == float("inf")
    assert relative_error(torch.ones(4), torch.ones(4)) == 0.0


def test_with_gradients_accumulates_nothing():
    x = torch.tensor([2.0], requires_grad=True)
    for _ in range(2):
        found = with_gradients(lambda: x * x, {"x": x}, torch.ones(1))
        assert (found["out"].item(), found["d_x"].item()) == (4.0, 4.0)
    assert x.grad is None


def test_peak_cpu_memory_counts_what_is_held_at_once():
    def call():
        first = torch.empty(1000, 1000)
        second = torch.empty(500, 1000)
        del first
        return second, torch.empty(100, 1000)

    # The call's own frame and the allocator's padding cost next to nothing.
    assert 6_000_000 <= peak_cpu_memory(call) < 6_010_000
