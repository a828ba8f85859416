"""Threshold routing: as many experts for a token as it has gates above the layer's threshold.

Over 400 lines: what training keeps, what eval mode keeps and what the thresholds do between them are one definition.
"""

import copy
import math
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vmoe_torch
from vmoe_torch.layers import ROUTERS, MoeMlp, Threshold
from vmoe_torch.layers import thresholds as tables

D, H, E, K = 6, 5, 4, 2


def _layer(**options) -> MoeMlp:
    torch.manual_seed(0)
    defaults = {"num_experts": E, "router": "threshold", "act_layer": "relu", "capacity_multiple_of": 1}
    return MoeMlp(D, H, **{**defaults, "dtype": torch.float64, **options})


def _tokens(images: int = 3, length: int = 5) -> torch.Tensor:
    return torch.randn(images, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _kept(gates: np.ndarray, size: int, mean: float | None, threshold: float | None) -> np.ndarray:
    """Which of the (T, K) candidates pass: by count in every group of S tokens, or by a threshold."""
    if mean is None:
        return gates >= threshold
    kept = np.zeros(gates.shape, bool)
    for first in range(0, len(gates), size):
        group = gates[first : first + size]
        order = np.argsort(-group.reshape(-1), kind="stable")
        kept[first : first + size].reshape(-1)[order[: round(len(group) * mean)]] = True
    return kept


def _defined(layer: MoeMlp, x: torch.Tensor, mean: float, by_count: bool, threshold: float | None = None) -> np.ndarray:
    """Threshold routing in NumPy, one token and choice at a time."""
    weights = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    tokens = x.flatten(0, 1).numpy()
    size = min(layer.group_size * x.shape[1], len(tokens))
    logits = tokens @ weights["router.weight"].T
    gates = np.exp(logits - logits.max(1, keepdims=True))
    gates /= gates.sum(1, keepdims=True)
    experts = np.argsort(-gates, axis=1, kind="stable")[:, :K]
    chosen = np.take_along_axis(gates, experts, 1)
    kept = _kept(chosen, size, mean if by_count else None, threshold)
    y = np.zeros_like(tokens)
    for first in range(0, len(tokens), size):
        group = np.arange(first, min(first + size, len(tokens)))
        factor = layer.capacity_factor if layer.training else layer.eval_capacity_factor
        capacity = min(math.ceil(len(group) * mean * factor / E), len(group))
        order = group[np.argsort(-chosen[group, 0], kind="stable")] if layer.batch_priority else group
        used = np.zeros(E, int)
        for rank in range(K):
            for t in order:
                e = experts[t, rank]
                if kept[t, rank] and used[e] < capacity:
                    used[e] += 1
                    hidden = np.maximum(weights["fc1.weight"][e] @ tokens[t] + weights["fc1.bias"][e], 0)
                    y[t] += chosen[t, rank] * (weights["fc2.weight"][e] @ hidden + weights["fc2.bias"][e])
    return y.reshape(x.shape)


@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("group_size", [1, 2, 8])
@pytest.mark.parametrize("factor", [0.6, 2.0])
@pytest.mark.parametrize("mean", [0.5, 1, 1.4, 2])
def test_training_keeps_the_largest_gates_of_a_group(mean, factor, group_size, batch_priority):
    layer = _layer(
        mean_selected_experts=mean,
        capacity_factor=factor,
        group_size=group_size,
        batch_priority=batch_priority,
        noise_std=0.0,
    )
    x = _tokens()
    np.testing.assert_allclose(layer(x).detach(), _defined(layer, x, mean, True), rtol=1e-12, atol=1e-12)
    sizes = [5, 5, 5] if group_size == 1 else [10, 5] if group_size == 2 else [15]
    assert layer.record.selected.sum() == sum(round(size * mean) for size in sizes)
    groups = layer.record.groups
    assert groups.capacity == min(math.ceil(sizes[0] * mean * factor / E), sizes[0])


@pytest.mark.parametrize("router", ["threshold", "top_experts"])
@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("threshold", [0.2, 0.35, 1.0])
@pytest.mark.parametrize("mean", [None, 1.4])
def test_eval_mode_keeps_what_reaches_the_threshold(router, batch_priority, threshold, mean):
    options = {"router": router, "mean_selected_experts": mean, "gate_threshold": threshold, "capacity_factor": 0.7}
    layer = _layer(batch_priority=batch_priority, **options).eval()
    x = _tokens()
    want = _defined(layer, x, mean or K, False, threshold)
    np.testing.assert_allclose(layer(x).detach(), want, rtol=1e-12, atol=1e-12)
    assert 0 < layer.record.selected.sum() < layer.record.selected.numel() or threshold == 1.0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"batch_priority": False}, {"capacity_factor": 0.4}, {"group_size": 2}], ids=str
)
@pytest.mark.parametrize(
    "setting", [{}, {"gate_threshold": 0.0}, {"mean_selected_experts": 2.0}, {"mean_selected_experts": 2}], ids=str
)
def test_threshold_0_is_top_experts_bit_for_bit(setting, options, training):
    layers = [_layer(router="top_experts", **options), _layer(**setting, **options)]
    layers[1].load_state_dict(layers[0].state_dict())
    found = []
    for layer in layers:
        layer.train(training)
        x = _tokens().requires_grad_()
        for _ in range(2):
            # What training finds changes nothing in eval mode.
            torch.manual_seed(3)
            y = layer.train(training)(x)
        y.square().sum().backward()
        found.append([y, layer.record.loss, layer.record.slots, x.grad, *(each.grad for each in layer.parameters())])
    assert all(want is got is None or torch.equal(want, got) for want, got in zip(*found, strict=True))
    assert (found[0][1] is None) == (not training)


@pytest.mark.parametrize("mean", [0.25, 0.5, 1.3, 1.75])
def test_exactly_so_many_are_kept_of_equal_gates(mean):
    """A router of zeros: all gates are 1 / E, and the first tokens win, their first choices and their second ones."""
    layer = _layer(mean_selected_experts=mean, noise_std=0.0, capacity_factor=8.0, group_size="batch")
    torch.nn.init.zeros_(layer.router.weight)
    layer(_tokens())
    wanted = round(15 * mean)
    assert torch.equal(layer.record.selected.flatten(), torch.arange(30) < wanted)
    assert torch.equal(layer.record.slots >= 0, layer.record.selected)


def test_equal_tokens_and_a_group_of_one():
    layer = _layer(mean_selected_experts=0.5, noise_std=0.0, group_size=1)
    layer(_tokens(1, 1).expand(3, 1, D).contiguous())
    assert layer.record.selected.tolist() == [[True, False]] * 3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{"mean_selected_experts": 1.3}, {"gate_threshold": 0.3}], ids=str)
def test_gradients(options, training):
    layer = _layer(noise_std=0.0, auxiliary_mode="manual", act_layer="gelu", **options).train(training)
    if not training:
        layer.train()(_tokens())
        layer.eval()
    names, weights = zip(*layer.named_parameters())

    def run(x, *weights):
        y = torch.func.functional_call(layer, dict(zip(names, weights)), x)
        return (y, layer.record.loss) if training else y

    inputs = [each.detach().clone().requires_grad_() for each in (_tokens(2, 4), *weights)]
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)
    assert 0 < layer.record.selected.sum() < layer.record.selected.numel()


def test_load_counts_what_is_kept():
    """Importance is of all gates; the load of an expert is scaled by the share of its choices that are kept."""
    plain, layer = _layer(router="top_experts"), _layer(mean_selected_experts=1.3)
    layer.load_state_dict(plain.state_dict())
    for each in (plain, layer):
        torch.manual_seed(5)
        each(_tokens())
    experts, selected = layer.record.experts.numpy(), layer.record.selected.numpy()
    share = [selected[experts == e].mean() if (experts == e).any() else 1.0 for e in range(E)]
    assert min(share) < 1
    assert torch.equal(layer.record.importance, plain.record.importance)
    np.testing.assert_allclose(layer.record.load, plain.record.load * torch.tensor(share), rtol=1e-12)
    load, importance = layer.record.load.numpy(), layer.record.importance.numpy()
    losses = [(each.std() / each.mean()) ** 2 for each in (importance, load)]
    np.testing.assert_allclose(layer.record.loss, 0.005 * sum(losses), rtol=1e-12)


def test_an_image_alone_is_itself():
    """Groups of one image at any capacity, and a threshold in eval mode at a capacity that drops nothing."""
    x = _tokens(4)
    image = {"mean_selected_experts": 1.4, "group_size": "image", "noise_std": 0.0, "capacity_factor": 0.6}
    for training, options in ((True, image), (False, image), (False, {"gate_threshold": 0.3, "capacity_factor": 4.0})):
        layer = _layer(**options)
        layer(x)
        y, selected = layer.train(training)(x), layer.record.selected
        torch.testing.assert_close(layer(x[2:3]), y[2:3], rtol=1e-13, atol=1e-13)
        assert torch.equal(layer.record.selected, selected[10:15])
        assert 0 < selected.sum() < selected.numel()


@pytest.mark.parametrize("mean", [0.8, 1.4, 1.237])
def test_eval_mode_uses_what_training_found(mean):
    layer = _layer(mean_selected_experts=mean, noise_std=0.0, group_size="batch", capacity_factor=4.0)
    x = _tokens(20)
    assert not layer.router.thresholds.any()
    layer.eval()(x)
    # Nothing has been found, and nothing is cut.
    assert layer.record.selected.all()
    for _ in range(3):
        layer.train()(x)
    in_training = layer.record.selected
    layer.eval()(x)
    if mean == 1.237:
        assert abs(int(layer.record.selected.sum()) - int(in_training.sum())) <= 1
    else:
        assert torch.equal(layer.record.selected, in_training)


def test_thresholds_are_moving_averages():
    layer = _layer(mean_selected_experts=1.4, noise_std=0.0, group_size=2)
    batches = [_tokens(), torch.randn(3, 5, D, dtype=torch.float64), torch.randn(3, 5, D, dtype=torch.float64)]
    want = None
    for x in batches:
        layer(x)
        gates = layer.record.gates.numpy()
        found = np.zeros(800)
        for first, size in ((0, 10), (10, 5)):
            ordered = -np.sort(-gates[first : first + size].reshape(-1))
            for point in range(200):
                rank = max(round(size * ((point + 1) / 100)), 1)
                found[point] += ordered[rank - 1] * size / 15
        want = found if want is None else 0.99 * want + 0.01 * found
    np.testing.assert_allclose(layer.router.thresholds, want, rtol=1e-12)
    before = layer.router.thresholds.clone()
    layer(torch.full_like(batches[0], math.nan))
    layer.eval()(batches[0])
    assert torch.equal(layer.router.thresholds, before)


@pytest.mark.parametrize("tokens", [41, 57, 69])
def test_what_training_keeps_is_what_eval_mode_keeps_at_halves(tokens):
    layer = _layer(mean_selected_experts=1.5, noise_std=0.0, group_size="image", capacity_factor=4.0)
    x = torch.randn(1, tokens, D, dtype=torch.float64)
    layer(x)
    kept = int(layer.record.selected.sum())
    assert kept == round(1.5 * tokens)
    layer.eval()(x)
    assert int(layer.record.selected.sum()) == kept


def test_thresholds_keep_their_precision_and_the_empty_batch_teaches_nothing():
    layer = _layer(mean_selected_experts=1.0).float()
    layer(_tokens().float())
    found = layer.router.thresholds.clone()
    assert found.dtype == torch.float32
    layer(_tokens()[:0].float())
    assert torch.equal(layer.router.thresholds, found)
    for half in (layer.bfloat16(), layer.half(), layer.to(torch.bfloat16)):
        assert half.router.weight.dtype in (torch.bfloat16, torch.float16)
        assert torch.equal(half.router.thresholds, found)
    assert layer.double().router.thresholds.dtype == torch.float64


def test_a_mean_that_no_training_found_a_threshold_for_is_told():
    layer = _layer(num_selected_experts=2, num_experts=8, noise_std=0.0)
    message = "no training has found a threshold for mean_selected_experts="
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vmoe_torch.set_routing(layer, mean_selected_experts=1.5)
        layer(_tokens())
        vmoe_torch.set_routing(layer.eval(), mean_selected_experts=1.2)
        # All choices, whatever the thresholds.
        vmoe_torch.set_routing(layer, mean_selected_experts=2.0)
    # More than the training had choices.
    with pytest.warns(UserWarning, match=message + "2.5 in .*cut nothing"):
        vmoe_torch.set_routing(layer, num_selected_experts=4, mean_selected_experts=2.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vmoe_torch.set_routing(layer, num_selected_experts=4, mean_selected_experts=2.5, data=_tokens())
    layer.router.reset_parameters()
    with pytest.warns(UserWarning, match=message + "1.2"):
        vmoe_torch.set_routing(layer, num_selected_experts=2, mean_selected_experts=1.2)
    # To whom warnings are errors, nothing has changed.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=message):
            vmoe_torch.set_routing(layer, mean_selected_experts=1.4)
    assert layer.mean_selected_experts == 1.2
    with pytest.raises(ValueError, match="mean_selected_experts must be at most 8 with router='threshold', got 9"):
        MoeMlp(D, 32, num_experts=16, num_selected_experts=16, router="threshold", mean_selected_experts=9.0)


@pytest.mark.parametrize("sizes", [None, (1.0, 1.0, 0.5, 0.5)])
@pytest.mark.parametrize("router", ["top_experts", "threshold"])
def test_groups_of_which_nothing_is_kept_have_a_loss(router, sizes):
    layer = MoeMlp(16, 32, num_experts=4, gate_threshold=0.99, router=router, expert_hidden=sizes)
    y = layer(torch.randn(2, 8, 16))
    assert not layer.record.selected.any()
    assert torch.equal(y, torch.zeros_like(y))
    assert vmoe_torch.auxiliary_loss(layer).isfinite()
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_a_recomputed_forward_teaches_once():
    layer = _layer(mean_selected_experts=(1, 1.5), group_size="batch", auxiliary_mode="manual")
    twin = copy.deepcopy(layer)
    x = _tokens()
    for reentrant in (False, True):
        for each, run in ((layer, partial(checkpoint, layer, use_reentrant=reentrant)), (twin, twin)):
            inputs = x.clone().requires_grad_()
            torch.manual_seed(7)
            run(inputs).square().sum().backward()
            each.router.weight.data.mul_(1.1)
            each.x_grad = inputs.grad
        assert torch.equal(layer.router.thresholds, twin.router.thresholds)
        assert torch.equal(layer.x_grad, twin.x_grad)


def test_several_means_are_drawn_and_have_room():
    layer = _layer(mean_selected_experts=[1, 1.5, 2], noise_std=0.0, group_size=2)
    x = _tokens()
    torch.manual_seed(0)
    counts = []
    for _ in range(30):
        layer(x)
        counts.append(int(layer.record.selected.sum()))
        assert layer.record.groups.capacity == math.ceil(10 * 2 * 1.05 / E)
    assert set(counts) == {15, 15 + 8, 30}
    assert layer.routing()["mean_selected_experts"] == (1.0, 1.5, 2.0)
    assert layer.eval()(x).isfinite().all()
    assert layer.record.selected is None


def test_nan_shows():
    for layer in (_layer(mean_selected_experts=1.2), _layer(gate_threshold=0.3).eval()):
        x = _tokens()
        x[0, 1] = math.nan
        y = layer(x)
        assert y[0, 1].isnan().all()
        assert not y[1:].isnan().any()
        layer.train()(x)
        assert layer.router.thresholds.isfinite().all()


def test_no_tokens():
    layer = _layer(mean_selected_experts=1.2)
    assert layer(torch.empty(0, 5, D, dtype=torch.float64)).shape == (0, 5, D)
    assert not layer.router.thresholds.any()


def test_state_dict():
    layer = _layer(mean_selected_experts=1.2)
    layer(_tokens())
    layer.eval()
    other = _layer(mean_selected_experts=1.2).eval()
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(_tokens()), layer(_tokens()))
    assert set(layer.state_dict()) - set(_layer(router="top_experts").state_dict()) == {"router.thresholds"}
    # Weights of top experts cut nothing.
    other.load_state_dict(_layer(router="top_experts").state_dict())
    assert not other.router.thresholds.any()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*router\.thresholds"):
        _layer(router="top_experts").load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*router\.weight"):
        other.load_state_dict({})


def test_meta_device_and_reset():
    layer = _layer(mean_selected_experts=1.2)
    layer(_tokens())
    layer.router.reset_parameters()
    assert not layer.router.thresholds.any()
    empty = _layer(mean_selected_experts=1.2, device="meta")
    assert empty.router.thresholds.is_meta
    assert empty(torch.empty(2, 5, D, dtype=torch.float64, device="meta")).shape == (2, 5, D)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mean_selected_experts": 0},
            r"mean_selected_experts must be above 0 and at most num_selected_experts=2, got 0",
        ),
        ({"mean_selected_experts": 2.1}, r"mean_selected_experts must be above 0 .*, got 2.1"),
        ({"mean_selected_experts": -1.0}, r"mean_selected_experts must be above 0 .*, got -1.0"),
        ({"mean_selected_experts": math.nan}, r"mean_selected_experts must be above 0 .*, got nan"),
        ({"mean_selected_experts": True}, r"mean_selected_experts must be above 0 .*, got True"),
        ({"mean_selected_experts": "1"}, r"mean_selected_experts must be above 0 .*, got '1'"),
        ({"mean_selected_experts": ()}, r"mean_selected_experts must be above 0 .*, got none"),
        ({"mean_selected_experts": (1, 3)}, r"mean_selected_experts must be above 0 .*, got 3"),
        ({"gate_threshold": -0.1}, r"gate_threshold must be None or in 0..1, got -0.1"),
        ({"gate_threshold": 1.1}, r"gate_threshold must be None or in 0..1, got 1.1"),
        ({"gate_threshold": "0.1"}, r"gate_threshold must be None or in 0..1, got '0.1'"),
        ({"renormalize_gates": True}, r"renormalize_gates must be False unless router is 'top_experts', got router="),
        (
            {"router": "top_experts", "mean_selected_experts": 1.4},
            r"gate_threshold must be given with mean_selected_exp",
        ),
        (
            {"router": "top_experts", "mean_selected_experts": (1, 2), "gate_threshold": 0.1},
            r"mean_selected_experts must be one number unless router is 'threshold', got \(1.0, 2.0\)",
        ),
        (
            {"router": "top_experts", "gate_threshold": 0.1, "renormalize_gates": True},
            r"gate_threshold must be None with renormalize_gates, got 0.1",
        ),
        (
            {"router": "expert_choice", "gate_threshold": 0.1},
            r"gate_threshold must be None for the router ExpertChoice",
        ),
        (
            {"router": "expert_choice", "mean_selected_experts": 1.0},
            r"mean_selected_experts must be None for the router ExpertChoice, got 1.0",
        ),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        _layer(**options)


def test_compiles_whole():
    for options in ({"mean_selected_experts": 1.3}, {"mean_selected_experts": (1, 2)}, {"gate_threshold": 0.3}):
        layer = _layer(noise_std=0.0, **options)
        twin = copy.deepcopy(layer)
        run = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.manual_seed(1)
            y = run(_tokens())
            torch.manual_seed(1)
            torch.testing.assert_close(y, twin(_tokens()))
        y.sum().backward()
        torch.testing.assert_close(layer.router.thresholds, twin.router.thresholds)


def test_scripted_in_eval_mode():
    for options in ({"mean_selected_experts": 1.3}, {"mean_selected_experts": 1.237}, {"gate_threshold": 0.3}, {}):
        layer = _layer(**options)
        layer(_tokens())
        layer.eval()
        assert torch.equal(torch.jit.script(layer)(_tokens()), layer(_tokens()))


def test_transforms():
    """torch.func's gradients and vmap find what a loop finds, and teach no thresholds."""
    layer = _layer(mean_selected_experts=1.3, noise_std=0.0, auxiliary_mode="manual", group_size="image")
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, x.unsqueeze(0)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, _tokens())
    assert not layer.router.thresholds.any()
    for number, x in enumerate(_tokens()):
        grads = torch.autograd.grad(loss(weights, x), list(weights.values()))
        for name, want in zip(weights, grads):
            torch.testing.assert_close(found[name][number], want)


def test_names():
    assert ROUTERS["threshold"] is Threshold
    assert len(_layer().router.thresholds) == tables.POINTS
