"""Experts of several sizes against their definition in NumPy; equal sizes are the old layer, bit for bit."""

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import vmoe_torch
from vmoe_torch.layers import ExpertLinear, ExpertSizes, MoeMlp, SizedLinear
from vmoe_torch.layers.sizes import resolve_sizes

# Interleaved, with a null expert.
SIZES = (16, 48, 0, 16, 48, 32)
KEYS = ("fc1.experts_0_3", "fc1.experts_1_4", "fc1.experts_5", "fc2.experts_0_3", "fc2.experts_1_4", "fc2.experts_5")


def _layer(expert_hidden=SIZES, seed=0, **kwargs) -> MoeMlp:
    torch.manual_seed(seed)
    settings = {"num_experts": len(expert_hidden), "group_size": 2, "noise_std": 0.0, "capacity_multiple_of": 1}
    layer = MoeMlp(8, 48, 12, expert_hidden=expert_hidden, dtype=torch.float64, **{**settings, **kwargs})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def _gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def _weights(layer: MoeMlp, expert: int):
    """Of one expert: its place in its size's tensors follows from the sizes alone."""
    size = layer.expert_hidden[expert]
    same = [e for e, own in enumerate(layer.expert_hidden) if own == size]
    found = []
    for fc in (layer.fc1, layer.fc2):
        (linear,) = [part for part in fc.linears() if size in part.weight.shape[1:] and len(part.weight) == len(same)]
        found += [linear.weight[same.index(expert)], linear.bias[same.index(expert)]]
    return [tensor.detach().numpy() for tensor in found]


def _definition(layer: MoeMlp, tokens, slots, gates):
    """y = sum over kept choices of g_e * (W2_e gelu(W1_e x + b1_e) + b2_e); a null expert gives g * 0."""
    y = np.zeros((len(tokens), 12))
    rows = layer.record.groups.rows
    for t, choices in enumerate(slots):
        for k, slot in enumerate(choices):
            if slot >= 0 and layer.expert_hidden[slot // rows] > 0:
                w1, b1, w2, b2 = _weights(layer, slot // rows)
                y[t] += gates[t, k] * (w2 @ _gelu(w1 @ tokens[t] + b1) + b2)
    return y


@pytest.mark.parametrize("options", [{}, {"dispatch_dtype": "float32"}, {"router": "expert_choice"}], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_output_is_the_definition_s(impl, options):
    layer = _layer(impl=impl, capacity_factor=0.8, **options)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    y = layer(x)
    record = layer.record
    assert {int(slot) // record.groups.rows for slot in record.slots.unique() if slot >= 0} == set(range(6))
    want = _definition(layer, x.view(-1, 8).numpy(), record.slots.numpy(), record.gates.numpy())
    np.testing.assert_allclose(y.detach().view(-1, 12).numpy(), want, atol=1e-12)


def test_parameters_are_those_of_the_sizes():
    layer = _layer()
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "router.weight": (6, 8),
        "fc1.experts_1_4.weight": (2, 48, 8),
        "fc1.experts_5.weight": (1, 32, 8),
        "fc1.experts_0_3.weight": (2, 16, 8),
        "fc2.experts_1_4.weight": (2, 12, 48),
        "fc2.experts_5.weight": (1, 12, 32),
        "fc2.experts_0_3.weight": (2, 12, 16),
    }
    experts = sum(p.numel() for fc in (layer.fc1, layer.fc2) for p in fc.parameters())
    # A null expert has none, not even a bias.
    assert experts == sum((8 + 12) * h + h + 12 for h in SIZES if h > 0)
    assert isinstance(layer.fc1, SizedLinear)
    assert "expert_hidden=(16, 48, 0, 16, 48, 32)" in repr(layer)
    assert "experts_2to4_6" in dict(
        MoeMlp(16, num_experts=7, expert_hidden=[0, 0, 16, 16, 16, 0, 16]).fc1.named_children()
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", [[48] * 4, (1.0,) * 4, [1.0, 48, 1.0, np.int64(48)]], ids=str)
def test_equal_sizes_are_the_layer_of_equal_experts(given, training):
    def made(**kwargs):
        torch.manual_seed(1)
        return MoeMlp(8, 48, num_experts=4, drop=0.1, capacity_factor=0.7, **kwargs).train(training)

    results = []
    for layer in (made(), made(expert_hidden=given, size_loss_weight=0.5)):
        torch.manual_seed(2)
        x = torch.randn(3, 5, 8, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, vmoe_torch.auxiliary_loss(layer), *(p.grad for p in layer.parameters())])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert made().state_dict().keys() == layer.state_dict().keys()
    assert isinstance(layer.fc1, ExpertLinear)
    assert layer.expert_hidden == (48,) * 4


def test_gradients():
    layer = MoeMlp(2, 32, 1, num_experts=4, expert_hidden=[16, 32, 0, 16], group_size=2, dtype=torch.float64).eval()
    nn.init.normal_(layer.router.weight)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_null_expert_gives_nothing_but_its_gate_counts():
    layer = _layer((48, 0), num_selected_experts=2, capacity_factor=4.0, renormalize_gates=True).eval()
    nn.init.zeros_(layer.router.weight)
    one = _layer((48,), num_selected_experts=1, capacity_factor=4.0, renormalize_gates=True).eval()
    one.fc1.load_state_dict(layer.fc1.experts_0.state_dict())
    one.fc2.load_state_dict(layer.fc2.experts_0.state_dict())
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), one(x) / 2)
    alone = _layer((48, 0), num_selected_experts=1, capacity_factor=4.0).eval()
    alone.router.weight.data[1] = 100.0
    alone.router.weight.data[0] = -100.0
    x = x.abs()
    assert torch.equal(alone(x), torch.zeros(2, 3, 12, dtype=torch.float64))
    assert (alone.record.slots >= 0).all()


def test_losses_balance_each_size_and_price_the_wide():
    generator = torch.Generator().manual_seed(5)
    sums = [torch.rand(3, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
    weights = {"importance_loss_weight": 0.25, "load_loss_weight": 0.5, "size_loss_weight": 2.0}
    router = _layer(**weights, noise_std=1.0).router.train()
    importance, load, mean_gates, _ = (each.numpy() for each in sums)
    groups = ([0, 3], [1, 4], [5], [2])
    cv = lambda values: values.var(1) / values.mean(1) ** 2  # noqa: E731
    want = 0.25 * sum(cv(importance[:, group]) for group in groups)
    want += 0.5 * sum(cv(load[:, group]) for group in groups)
    want += 2.0 * (mean_gates * np.array(SIZES) / 48).sum(1)
    assert router.auxiliary_loss(*sums).item() == pytest.approx(want.mean(), rel=1e-6)
    # Balance across sizes is nobody's business.
    uneven = torch.tensor([[1.0, 50.0, 7.0, 1.0, 50.0, 3.0]])
    router = _layer(noise_std=1.0).router.train()
    assert router.auxiliary_loss(uneven, uneven, uneven, uneven) == 0
    assert _layer((48,) * 6, noise_std=1.0).router.train().auxiliary_loss(uneven, uneven, uneven, uneven) > 0


def test_a_size_that_no_token_is_near_to_is_balanced():
    layer = _layer(noise_std=0.1, num_selected_experts=1, capacity_factor=6.0, size_loss_weight=1.0).train()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = 1000.0
    x = torch.rand(2, 3, 8, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.record.load[:, 1:].max() == 0
    assert vmoe_torch.auxiliary_loss(layer).isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in (x, *layer.parameters()))


def test_the_size_loss_draws_tokens_to_narrow_experts():
    shares = []
    for weight in (0.0, 1.0):
        layer = _layer((48, 16), num_selected_experts=1, size_loss_weight=weight, importance_loss_weight=0.0).train()
        x = torch.rand(2, 16, 8, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
        for _ in range(30):
            optimizer.zero_grad()
            (0.0 * layer(x).sum()).backward()
            optimizer.step()
        layer(x)
        shares.append(layer.record.mean_gates[:, 1].mean().item())
    assert shares[1] > shares[0] + 0.2


def test_dropout_masks_of_experts_differ():
    layer = MoeMlp(4, 16, num_experts=3, num_selected_experts=3, expert_hidden=[16, 0, 32], expert_drop=0.5)
    other = MoeMlp(4, 16, num_experts=2, num_selected_experts=2, expert_hidden=[48, 16], expert_drop=0.5)
    for each in (layer, other):
        x = torch.randn(2, 8, 4)
        assert not torch.equal(each.train()(x), each(x))
        assert torch.equal(each.eval()(x), each(x))


def test_copies_state_dicts_and_compilers():
    layer, x = _layer().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    want = layer(x)
    other = _layer(seed=9).eval()
    assert not torch.equal(other(x), want)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), want)
    with pytest.raises(RuntimeError, match="experts_0_3"):
        _layer((48, 16, 0, 16, 48, 32)).load_state_dict(layer.state_dict())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), want)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), want)
    with torch.device("meta"):
        assert _layer()(torch.randn(3, 5, 8, dtype=torch.float64)).shape == (3, 5, 12)
    with pytest.raises(RuntimeError, match="a scripted MoeMlp must have experts of one size"):
        torch.jit.script(layer)


def test_a_compiled_training_step_is_the_eager_one():
    torch._dynamo.reset()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gradients = []
    for compiled in (False, True):
        layer = _layer(size_loss_weight=0.1).train()
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        run(x).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast():
    layer, x = _layer().float().eval(), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)


def test_hooks_and_calls_of_each_size():
    layer, x = _layer().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    want, called = layer(x), []
    for name, module in layer.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    assert torch.equal(layer(x), want)
    assert set(KEYS) | {"fc1", "fc2", "router"} <= set(called)
    wide, middle, narrow = layer.fc1(x[0])
    assert (wide.shape, middle.shape, narrow.shape) == ((2, 5, 48), (1, 5, 32), (2, 5, 16))
    torch.testing.assert_close(narrow[1], x[0] @ layer.fc1.experts_0_3.weight[1].T + layer.fc1.experts_0_3.bias[1])
    assert layer.fc2([wide, middle, narrow])[1].shape == (1, 5, 12)


def test_transforms_and_vmap():
    layer, x = _layer(capacity_factor=4.0).eval(), torch.randn(3, 2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(layer)(x), torch.stack([layer(each) for each in x]))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_places_are_a_permutation_with_the_same_mix_on_every_rank(ranks):
    sizes = ExpertSizes([16, 32, 0, 16, 32, 16, 0, 0, 32, 16, 0, 32])
    slots = torch.arange(-1, 12 * 5, dtype=torch.int32).view(1, -1)
    placed = sizes.place(slots, 5, ranks)
    assert placed.dtype == torch.int32
    assert placed[0, 0] == -1
    assert sorted(placed[0].tolist()) == slots[0].tolist()
    own = [0] * 12
    for expert in range(12):
        first = int(placed[0, 1 + 5 * expert])
        assert placed[0, 1 + 5 * expert : 6 + 5 * expert].tolist() == list(range(first, first + 5))
        own[first // 5] = sizes.hidden[expert]
    mix = [32] * (4 // ranks) + [16] * (4 // ranks) + [0] * (4 // ranks)
    assert own == mix * ranks
    sorted_already = ExpertSizes([48, 48, 16, 0])
    assert sorted_already.place(slots, 5, 1) is slots


BAD = [
    ([48, 16], r"have a width for each of num_experts=4, got 2"),
    (True, r"have a width for each of num_experts=4, got True"),
    (20, r"0, H=48 or multiples of 16, as ints or as floats that are shares of H, got 20"),
    ("4848", r"got '4848'"),
    ([48, 16, 20, 48], r"0, H=48 or multiples of 16, as ints or as floats that are shares of H, got 20"),
    ([48, 16, -16, 48], r"got -16"),
    ([48, 16, 0.3, 48], r"got 0.3"),
    ([48, 16, math.nan, 48], r"got nan"),
    ([48, 16, math.inf, 48], r"got inf"),
    ([48, 16, True, 48], r"got True \(not a number\)"),
    ([48, 16, "16", 48], r"got '16' \(not a number\)"),
    ([48, 16, 1, 48], r"got 1$"),
    ([0, 0, 0.0, 0], r"leave hidden units to at least one expert, got 0 for all"),
]


def test_one_width_is_that_of_all():
    assert resolve_sizes(0.5, 4, 64).hidden == resolve_sizes(32, 4, 64).hidden == (32,) * 4
    assert resolve_sizes(64, 4, 64).hidden == resolve_sizes(None, 4, 64).hidden


@pytest.mark.parametrize(("given", "message"), BAD, ids=str)
def test_bad_sizes_are_refused(given, message):
    with pytest.raises(ValueError, match=rf"^expert_hidden must .*{message}"):
        MoeMlp(8, 48, num_experts=4, expert_hidden=given)


def test_wide_layers_have_wider_steps():
    with pytest.raises(ValueError, match="multiples of 128"):
        MoeMlp(8, 2048, num_experts=2, expert_hidden=[2048, 64])
    assert MoeMlp(8, 2000, num_experts=3, expert_hidden=[1.0, 256, 0]).expert_hidden == (2000, 256, 0)


def test_losses_that_do_not_suit_sizes_are_refused():
    with pytest.raises(ValueError, match=r"gshard_loss_weight must be 0 for experts of several sizes.*got 0.5"):
        _layer(gshard_loss_weight=0.5)
    with pytest.raises(ValueError, match=r"size_loss_weight must be 0 for router='expert_choice'.*got 0.5"):
        _layer(size_loss_weight=0.5, router="expert_choice")
    with pytest.raises(ValueError, match="size_loss_weight must be at least 0, got -1"):
        _layer(size_loss_weight=-1)


def test_models_take_shares(tmp_path):
    shares = [1.0, 1.0, 0.5, 0.0]
    model = timm.create_model("test_vmoe", img_size=32, depth=2, expert_hidden=shares, fix_init=True)
    layer = model.blocks[1].mlp
    assert layer.expert_hidden == (128, 128, 64, 0)
    assert torch.equal(layer.fc1.experts_0to1.weight[0], layer.fc1.experts_0to1.weight[1])
    images = torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.head.weight)
    torch.nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())
    vmoe_torch.set_routing(model.eval(), num_selected_experts=1, capacity_factor=0.5)
    vmoe_torch.save_for_hf(model, tmp_path / "hub")
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    kept = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all((id(p) in kept) == name.endswith("bias") for name, p in layer.fc1.named_parameters())


def test_ensembles_give_each_member_its_share():
    model = vmoe_torch.models.VMoEEnsemble(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, ensemble_size=2, num_experts=4,
        moe_layers=(1,), num_selected_experts=1, expert_hidden=[64, 32, 64, 0]
    )  # fmt: skip
    assert [member.expert_hidden for member in model.blocks[1].mlp.members] == [(64, 32), (64, 0)]
    assert model(torch.randn(2, 3, 16, 16)).shape == (4, 3)
    with pytest.raises(ValueError, match="num_experts=4, got 2"):
        vmoe_torch.models.VMoEEnsemble(img_size=16, depth=2, moe_layers=(1,), num_experts=4, expert_hidden=[64, 32])
