"""The shared expert against its definition in NumPy: a dense MLP that is added for every token, whatever the router."""

import copy
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

import vmoe_torch
from tests.tiny import randomized, tiny_model
from vmoe_torch.checkpoints import read_weights
from vmoe_torch.evaluate import count_flops
from vmoe_torch.layers import MoeMlp
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.models.ensemble import EnsembleMoeMlp
from vmoe_torch.planning import forward_flops
from vmoe_torch.weights.names import to_original

ROUTERS = (
    {},
    {"capacity_factor": "dropless"},
    {"router": "threshold", "mean_selected_experts": 1.5, "gate_threshold": 0.3},
    {"router": "expert_choice"},
    {"router": "soft", "slots_per_expert": 2},
    {"expert_hidden": [16, 32, 32, 0]},
    {"dispatch_dtype": "bfloat16"},
)


def _layer(dtype=torch.float64, **kwargs) -> MoeMlp:
    torch.manual_seed(0)
    options = {"num_experts": 4, "group_size": "image", "noise_std": 0.0, "capacity_multiple_of": 1, **kwargs}
    return MoeMlp(8, 32, 12, dtype=dtype, **options)


def _gelu(x):
    return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


@pytest.mark.parametrize("options", ROUTERS, ids=str)
def test_output_is_the_sum(options):
    layer, alone = _layer(shared_expert_hidden=24, **options), _layer(**options)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        if not name.startswith("shared_expert."):
            alone.get_parameter(name).data.copy_(parameter.data)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    shared = {name: value.detach().numpy() for name, value in layer.shared_expert.named_parameters()}
    assert [shared[f"{fc}.weight"].shape for fc in ("fc1", "fc2")] == [(24, 8), (12, 24)]
    hidden = _gelu(x.numpy() @ shared["fc1.weight"].T + shared["fc1.bias"])
    want = alone.eval()(x).detach().numpy() + hidden @ shared["fc2.weight"].T + shared["fc2.bias"]
    np.testing.assert_allclose(layer.eval()(x).detach(), want, rtol=1e-12, atol=1e-12)


def test_none_is_the_layer_that_was():
    plain = _layer()
    for none in (None, 0, 0.0):
        layer = _layer(shared_expert_hidden=none)
        assert layer.shared_expert is None
        assert layer.state_dict().keys() == plain.state_dict().keys()
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in layer.state_dict().items())


def test_it_learns():
    layer = _layer(shared_expert_hidden=1.0, auxiliary_mode="manual").train()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.shared_expert.parameters())

    def output(x, *given):
        named = dict(zip((f"shared_expert.{name}" for name, _ in layer.shared_expert.named_parameters()), given))
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters))


def test_copies_compilers_and_exports():
    layer = _layer(torch.float32, shared_expert_hidden=0.5).eval()
    x = torch.randn(3, 5, 8)
    want = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.jit.script(layer)):
        torch.testing.assert_close(twin(x), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), want)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), want)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    assert layer.to("meta")(x.to("meta")).shape == (3, 5, 12)
    # TorchScript of a layer without one.
    plain = _layer(torch.float32).eval()
    assert torch.equal(torch.jit.script(plain)(x), plain(x))


def test_begins_as_experts_do_and_decays_as_any_mlp():
    model = tiny_model(shared_expert_hidden=0.5, fix_init=True)
    shared = model.blocks[3].mlp.shared_expert
    bound = math.sqrt(6 / (16 + 16))
    assert 0.8 * bound < shared.fc1.weight.abs().max() <= bound
    # Of the last block of four, smaller by fix_init.
    assert 0.8 * bound < shared.fc2.weight.abs().max() * math.sqrt(8) <= bound * 1.001
    kept, decayed = param_groups_weight_decay(model, 0.1, model.no_weight_decay())
    assert any(parameter is shared.fc2.weight for parameter in decayed["params"])
    assert any(parameter is shared.fc2.bias for parameter in kept["params"])


def test_flops():
    model, plain = tiny_model(shared_expert_hidden=0.5), tiny_model()
    images = torch.zeros(8, 3, 32, 32)
    # 17 tokens, 16 units, two layers.
    extra = 2 * 17 * 2 * 2 * 16 * 16
    counted, other = count_flops(model.eval(), images), count_flops(plain.eval(), images)
    assert counted.total - other.total == extra
    assert counted.dense == other.dense
    assert forward_flops(model, 8) - forward_flops(plain, 8) == 8 * extra
    counter = FlopCounterMode(display=False)
    layer = model.blocks[1].mlp
    with counter:
        layer(torch.zeros(8, 17, 16))
    assert counter.get_total_flops() == layer.flops(8 * 17, layer.num_rows(8 * 17, 17))


def test_upcycling_begins_without_it():
    dense = randomized(tiny_model(moe_layers=()))
    images = torch.randn(2, 3, 32, 32)
    options = {"renormalize_gates": True, "capacity_factor": 4.0, "group_size": "image"}
    sparse = vmoe_torch.upcycle(dense, (1, 3), 4, shared_expert_hidden=0.25, **options)
    assert sparse.blocks[1].mlp.shared_expert.fc1.out_features == 8
    torch.testing.assert_close(sparse(images), dense(images), rtol=1e-4, atol=1e-4)
    sparse.train()(images).square().sum().backward()
    assert sparse.blocks[1].mlp.shared_expert.fc2.weight.grad.abs().max() > 0


def test_weights_say_that_it_is_there(tmp_path):
    model = randomized(timm.create_model("test_vmoe", shared_expert_hidden=0.5))
    images = torch.randn(2, 3, 160, 160)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    for name, state in (("described", model.state_dict()), ("plain", dict(plain))):
        torch.save(state, tmp_path / f"{name}.pt")
    again, _ = open_weights(read_weights(tmp_path / "described.pt"))
    assert torch.equal(again.eval()(images), model(images))
    told, _ = open_weights(read_weights(f"test_vmoe={tmp_path / 'plain.pt'}"))
    assert torch.equal(told.eval()(images), model(images))
    with pytest.raises(ValueError, match=r"has none for 'blocks.1.mlp.shared_expert.fc1"):
        to_original(model.state_dict(), 2)


def test_pruning_keeps_it_and_averaging_refuses_it():
    model = randomized(tiny_model(shared_expert_hidden=0.5))
    pruned = vmoe_torch.prune_experts(model, [0, 2])
    shared, before = (each.blocks[1].mlp.shared_expert.state_dict() for each in (pruned, model))
    assert all(torch.equal(value, before[name]) for name, value in shared.items())
    with pytest.raises(ValueError, match=r"shared_expert_hidden must be None for experts to become one MLP, got 16"):
        vmoe_torch.to_dense(model)


def test_every_member_of_an_ensemble_has_its_own():
    weights = dict.fromkeys(("importance_loss_weight", "load_loss_weight", "gshard_loss_weight"), 0.0)
    layer = EnsembleMoeMlp(8, 32, ensemble_size=2, num_experts=4, shared_expert_hidden=16, **weights)
    assert [member.shared_expert.fc1.out_features for member in layer.members] == [16, 16]


@pytest.mark.parametrize("value", [-1, 0.3, math.nan, math.inf, True, "1"])
def test_a_width_is_units_or_a_whole_share(value):
    with pytest.raises(ValueError, match=r"^shared_expert_hidden must be None, at least 0 units or"):
        MoeMlp(8, 16, shared_expert_hidden=value)
