"""MoeMlp: groups of any batch, routing control, statistics, modes, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vmoe_torch
from vmoe_torch.layers import MoeMlp


def _layer(**kwargs):
    torch.manual_seed(3)
    layer = MoeMlp(16, 32, **{"num_experts": 4, "group_size": 4, "noise_std": 0.0} | kwargs)
    nn.init.normal_(layer.router.weight)
    for fc in (layer.fc1, layer.fc2):
        nn.init.normal_(fc.weight, std=0.2)
        nn.init.normal_(fc.bias, std=0.2)
    return layer


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 8, 11])
def test_any_batch_is_routed_in_groups(batch):
    layer = _layer(capacity_factor=0.6)
    x = torch.randn(batch, 7, 16)
    y = layer(x)
    parts = [layer(part) for part in x.split(4)]
    torch.testing.assert_close(y, torch.cat(parts))


def test_image_groups_do_not_depend_on_neighbours():
    layer = _layer(capacity_factor=0.5, group_size="image")
    x = torch.randn(6, 7, 16)
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))
    whole = _layer(capacity_factor=0.5, group_size="batch")
    assert whole(x)[2:3].sub(whole(x[2:3])).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_works(training):
    layer = _layer(noise_std=1.0, expert_drop=0.1).train(training)
    x = torch.randn(0, 7, 16, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 7, 16)
    y.sum().backward()
    assert x.grad.shape == (0, 7, 16)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


def test_dims_between_batch_and_width_are_tokens():
    layer = _layer()
    x = torch.randn(5, 6, 16)
    assert torch.equal(layer(x.view(5, 2, 3, 16)), layer(x).view(5, 2, 3, 16))


def test_capacity_is_the_paper_s():
    layer = _layer(num_experts=8, num_selected_experts=2, capacity_factor=1.05, eval_capacity_factor=4.0)
    assert layer.capacity(400) == 108
    assert layer.eval().capacity(400) == 400
    layer.capacity_multiple_of = 0
    assert layer.train().capacity(400) == 105
    layer.capacity_rounding = "round"
    assert layer.capacity(41) == 11


def test_more_slots_than_tokens_change_nothing():
    x = torch.randn(4, 7, 16)
    full, plenty = _layer(capacity_factor=2.0), _layer(capacity_factor=50.0)
    torch.testing.assert_close(full(x), plenty(x))
    assert plenty.capacity(28) == 28


def test_dropped_tokens_are_zero():
    layer = _layer(capacity_factor=0.1, capacity_multiple_of=None)
    y = layer(torch.randn(4, 7, 16)).flatten(0, 1)
    dropped = (layer.record.slots < 0).all(1)
    assert dropped.any()
    assert torch.equal(y[dropped], torch.zeros_like(y[dropped]))
    assert (y[~dropped] != 0).any(1).all()


def test_noise_and_dropout_are_training_only():
    layer = _layer(noise_std=4.0, expert_drop=0.5)
    x = torch.randn(4, 7, 16)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_same_seed_gives_the_same_bits():
    layer = _layer(noise_std=1.0, expert_drop=0.2)
    x = torch.randn(4, 7, 16)
    outputs = []
    for _ in range(2):
        torch.manual_seed(9)
        outputs.append(layer(x))
    assert torch.equal(*outputs)


def test_exchange_sees_the_buffer_and_may_move_it():
    class Reversed:
        """Stands for an all-to-all: rows arrive in another order and go back."""

        def local(self, weight):
            return weight

        def run(self, buffer, experts):
            self.shape = tuple(buffer.shape)
            return experts(buffer.flip(1)).flip(1)

    layer = _layer(capacity_factor=0.7)
    x = torch.randn(6, 7, 16, requires_grad=True)
    alone = layer(x)
    alone.sum().backward()
    gradients = [x.grad.clone()] + [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    x.grad = None
    layer.exchange = Reversed()
    moved = layer(x)
    moved.sum().backward()
    assert layer.exchange.shape[0] == 4
    assert layer.exchange.shape[2] == 16
    torch.testing.assert_close(moved, alone)
    for got, want in zip([x.grad] + [p.grad for p in layer.parameters()], gradients):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_parts_of_an_exchange_drop_other_activations():
    class Halves:
        """Stands for an all-to-all in two parts."""

        def local(self, weight):
            return weight

        def run(self, buffer, experts):
            return torch.cat([experts(part) for part in buffer.chunk(2, dim=1)], dim=1)

    layer = _layer(expert_drop=0.5, num_selected_experts=1, num_experts=1, group_size="image", capacity_multiple_of=1)
    layer.exchange = Halves()
    # Equal tokens of one expert: their outputs differ by the masks alone.
    y = layer(torch.ones(1, 8, 16))
    assert len({tuple(token.tolist()) for token in y[0]}) == 8


@pytest.mark.parametrize("dispatch_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("renormalize_gates", [False, True])
def test_scripted_layer_computes_the_same(dispatch_dtype, renormalize_gates):
    layer = _layer(capacity_factor=0.7, dispatch_dtype=dispatch_dtype, renormalize_gates=renormalize_gates).eval()
    x = torch.randn(6, 7, 16)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


def test_output_width_may_differ():
    assert MoeMlp(16, 32, 24, num_experts=4)(torch.randn(2, 7, 16)).shape == (2, 7, 24)


def test_bfloat16_input_has_bfloat16_output():
    layer = MoeMlp(16, 32, num_experts=4, dtype=torch.bfloat16)
    x = torch.randn(2, 7, 16, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert _layer()(torch.randn(2, 7, 16)).dtype == torch.bfloat16


def test_statistics_describe_the_last_forward():
    layer = _layer(num_selected_experts=2, capacity_factor=0.5)
    model = nn.Sequential(layer)
    assert vmoe_torch.routing_stats(model) == {}
    model(torch.randn(4, 7, 16))
    stats = vmoe_torch.routing_stats(model)["0"]
    kept = layer.record.slots >= 0
    assert stats["load"].sum().item() == pytest.approx(1.0)
    assert stats["assigned"].sum().item() == pytest.approx(1.0)
    assert stats["importance"].sum().item() == pytest.approx(1.0)
    assert stats["dropped"].item() == pytest.approx(1 - kept.float().mean().item())
    counts = torch.bincount(layer.record.experts[kept].long(), minlength=4)
    torch.testing.assert_close(stats["load"], counts / counts.sum())
    assert stats["gates"].shape == (2,)


def test_copies_and_pickles_carry_no_record():
    layer = _layer(auxiliary_mode="manual")
    layer(torch.randn(4, 7, 16, requires_grad=True))
    assert layer.record.loss.requires_grad
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.record.loss is None
        assert twin.record.slots is None


def test_routing_changes_and_comes_back():
    layer = _layer(num_selected_experts=2, capacity_factor=1.5, eval_capacity_factor=3.0, group_size="batch")
    model = nn.Sequential(layer).eval()
    x = torch.randn(4, 7, 16)
    before = model(x)
    with vmoe_torch.routing(model, capacity_factor=0.3, num_selected_experts=1, batch_priority=False, group_size=1):
        assert (layer.capacity_factor, layer.eval_capacity_factor) == (0.3, 0.3)
        assert (layer.num_selected_experts, layer.batch_priority, layer.group_size) == (1, False, 1)
        assert not torch.equal(model(x), before)
    assert (layer.capacity_factor, layer.eval_capacity_factor, layer.group_size) == (1.5, 3.0, 0)
    assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="inside"), vmoe_torch.routing(model, num_selected_experts=1):
        raise RuntimeError("inside")
    assert layer.num_selected_experts == 2


def test_routing_of_one_layer_changes():
    model = nn.Sequential(_layer(), _layer())
    with vmoe_torch.routing(model):
        vmoe_torch.set_routing(model, layers=["1"], num_selected_experts=1, capacity_factor=0.5)
        assert [layer.num_selected_experts for layer in model] == [2, 1]
        assert [layer.eval_capacity_factor for layer in model] == [1.05, 0.5]
        with pytest.raises(ValueError, match="layers must be among 0, 1, got 2"):
            vmoe_torch.set_routing(model, layers=["0", "2"], num_selected_experts=1)
        assert model[0].num_selected_experts == 2
    assert model[1].num_selected_experts == 2


def test_failed_change_leaves_every_layer_alone():
    model = nn.Sequential(_layer(num_experts=8), _layer(num_experts=2))
    with pytest.raises(ValueError, match=r"num_selected_experts must be in 1\.\.num_experts=2, got 4"):
        vmoe_torch.set_routing(model, num_selected_experts=4, capacity_factor=0.2)
    assert [layer.num_selected_experts for layer in model] == [2, 2]
    assert [layer.capacity_factor for layer in model] == [1.05, 1.05]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_selected_experts": 5}, r"num_selected_experts must be in 1\.\.num_experts=4, got 5"),
        ({"num_experts": 0}, r"num_experts must be at least 1, got 0"),
        ({"num_selected_experts": 1.5}, r"num_selected_experts must be in 1\.\.num_experts=4, got 1\.5"),
        ({"capacity_factor": None}, r"capacity_factor must be above 0, got None"),
        ({"capacity_factor": 0.0}, r"capacity_factor must be above 0, got 0\.0"),
        ({"eval_capacity_factor": -1.0}, r"eval_capacity_factor must be above 0, got -1\.0"),
        ({"group_size": 0}, r"group_size must be 'batch', 'image' or at least 1 image, got 0"),
        ({"group_size": 1.5}, r"group_size must be 'batch', 'image' or at least 1 image, got 1\.5"),
        ({"group_size": "images"}, r"group_size must be one of \('batch', 'image'\), got 'images'"),
        ({"priority": "min"}, r"priority must be one of \('max', 'sum'\), got 'min'"),
        ({"router": "hash"}, r"router must be one of .*, got 'hash'"),
        ({"auxiliary_mode": "auto"}, r"auxiliary_mode must be one of .*, got 'auto'"),
        ({"dispatch_dtype": "float16"}, r"dispatch_dtype must be one of .*, got 'float16'"),
        ({"capacity_rounding": "floor"}, r"capacity_rounding must be one of .*, got 'floor'"),
        ({"impl": "cuda"}, r"impl must be one of .*, got 'cuda'"),
        ({"noise_std": -1.0}, r"noise_std must be at least 0, got -1\.0"),
        ({"norm_layer": nn.LayerNorm}, r"norm_layer must be None"),
        ({"act_layer": nn.Tanh}, r"act_layer of the experts: activation must be one of .*, got 'tanh'"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _layer(**kwargs)


def test_capacity_below_one_slot_is_named():
    layer = _layer(capacity_factor=0.01, capacity_rounding="round")
    with pytest.raises(ValueError, match=r"capacity must be at least 1 slot, got 0 from num_tokens=28"):
        layer(torch.randn(4, 7, 16))


def test_wrong_width_and_dtype_are_named():
    with pytest.raises(ValueError, match=r"x \(T, D\) and weight \(E, D\) must agree, got \(28, 8\)"):
        _layer()(torch.randn(4, 7, 8))
    with pytest.raises(ValueError, match=r"fc1_weight must be torch.float64 like x, got torch.float32"):
        _layer()(torch.randn(4, 7, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be floating point, got torch.int64"):
        _layer()(torch.ones(4, 7, 16, dtype=torch.int64))


def test_model_without_moe_layers_is_named():
    with pytest.raises(ValueError, match="model must have at least one MoE layer, got Linear without any"):
        vmoe_torch.set_routing(nn.Linear(2, 2), capacity_factor=1.0)


def test_unknown_routing_keyword_is_an_error():
    with pytest.raises(TypeError, match="capacity"):
        vmoe_torch.set_routing(_layer(), capacity=1.0)


def test_explicit_triton_never_falls_back():
    with pytest.raises(ValueError, match="impl='triton' needs Triton and a CUDA tensor, got a tensor on cpu"):
        _layer(impl="triton")(torch.randn(4, 7, 16))
