"""Layers and models without capacities: no choice is dropped, whatever tool runs them."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_torch
from tests.conftest import relative_error
from tests.tiny import dropping, grey_images, tiny_model
from vmoe_torch.analyze import random_routers
from vmoe_torch.budget import LayerSetting
from vmoe_torch.evaluate import RoutingSetting, as_rows, count_flops, evaluate, format_table
from vmoe_torch.layers import MoeMlp
from vmoe_torch.planning import PlannedRun, changes_that_fit, forward_flops, plan


def _layer(**options) -> MoeMlp:
    torch.manual_seed(0)
    settings = {"num_experts": 4, "num_selected_experts": 2, "group_size": 2, "capacity_factor": "dropless"}
    layer = MoeMlp(16, 24, **settings | options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def _roomy(layer: MoeMlp, **changes) -> MoeMlp:
    """The same layer with a slot for every token at every expert."""
    other = copy.deepcopy(layer)
    vmoe_torch.set_routing(other, capacity_factor=float(layer.num_experts), **changes)
    return other


def _step(layer: MoeMlp, x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients of a step, everything random alike."""
    torch.manual_seed(5)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("num_choices", [1, 2, 4])
@pytest.mark.parametrize("training", [False, True])
def test_it_is_a_capacity_that_drops_nothing_bit_for_bit(training, num_choices):
    layer = _layer(num_selected_experts=num_choices).train(training)
    x = torch.randn(5, 7, 16)
    roomy = _roomy(layer, batch_priority=False)
    for got, want in zip(_step(layer, x), _step(roomy, x)):
        assert torch.equal(got, want)
    assert (roomy.record.slots >= 0).all()
    # BPR fills the buffer in another order, which sums of gradients tell by rounding.
    for got, want in zip(_step(layer, x), _step(_roomy(layer, batch_priority=True), x)):
        assert relative_error(got, want) <= 1e-5


def test_order_priority_and_groups_change_nothing():
    layer, x = _layer().eval(), torch.randn(5, 7, 16)
    want = layer(x)
    for change in ({"batch_priority": False}, {"priority": "sum"}, {"group_size": "image"}, {"group_size": "batch"}):
        with vmoe_torch.routing(layer, **change):
            torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x[:1]), want[:1])


def test_it_drops_nothing_where_capacities_do():
    x = torch.randn(4, 9, 16)
    layer = _layer(capacity_factor=0.25, eval_capacity_factor="dropless")
    layer(x)
    assert vmoe_torch.routing_stats(layer)[""]["dropped"] > 0.5
    layer.eval()(x)
    stats = vmoe_torch.routing_stats(layer)[""]
    assert stats["dropped"] == stats["unprocessed"] == 0
    torch.testing.assert_close(stats["load"], stats["assigned"])
    # All tokens want one expert.
    with torch.no_grad():
        layer.router.weight.zero_()
    layer(x)
    assert vmoe_torch.routing_stats(layer)[""]["load"].tolist() == [0.5, 0.5, 0, 0]


def test_gradients_are_those_of_differences():
    layer = _layer(noise_std=0.0, auxiliary_mode="manual").double().train()
    assert torch.autograd.gradcheck(layer, torch.randn(1, 2, 16, dtype=torch.float64, requires_grad=True))


def test_an_empty_batch_passes():
    layer = _layer().train()
    y = layer(torch.randn(0, 7, 16))
    y.sum().backward()
    assert y.shape == (0, 7, 16)
    assert all(not parameter.grad.any() for parameter in layer.parameters())


class Launched(TorchDispatchMode):
    """Names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "vmoe":
            self.names.append(operator._schema.name.removeprefix("vmoe::"))
        return operator(*args, **(kwargs or {}))


def test_what_a_forward_launches():
    with torch.no_grad(), Launched() as launched:
        _layer().eval()(torch.randn(5, 7, 16))
    assert launched.names == ["router", "assign_dropless_slots", "dropless_mlp"]


@pytest.mark.parametrize("options", [{"expert_drop": 0.4}, {"renormalize_gates": True}, {"bias": False}], ids=str)
def test_other_options_go_with_it(options):
    layer, x = _layer(noise_std=0.0, **options).train(), torch.randn(4, 7, 16)
    first = _step(layer, x)
    assert all(torch.equal(got, want) for got, want in zip(_step(layer, x), first))
    if "expert_drop" not in options:
        reference = copy.deepcopy(layer)
        reference.own_router().impl = "reference"
        for got, want in zip(_step(reference, x), first):
            assert relative_error(got, want) <= 1e-5


def test_rows_are_rounded_on_their_way_as_with_capacities():
    layer, x = _layer(dispatch_dtype="bfloat16").eval(), torch.randn(4, 7, 16)
    assert relative_error(layer(x), _roomy(layer)(x)) <= 1e-6
    plain = _layer().eval()
    plain.load_state_dict(layer.state_dict())
    assert relative_error(layer(x), plain(x)) >= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_and_mixed_dtypes(dtype):
    x = torch.randn(4, 7, 16)
    layer = _layer().eval()
    want = layer(x)
    with torch.autocast("cpu", dtype):
        got = layer(x)
    assert got.dtype == dtype
    assert relative_error(got.float(), want) <= 0.02
    narrow = layer.to(dtype)(x.to(dtype))
    assert narrow.dtype == dtype
    assert relative_error(narrow.float(), want) <= 0.02


def test_random_routers_route_it_too():
    layer, x = _layer().eval(), torch.randn(4, 7, 16)
    want = layer(x)
    with random_routers(nn.Sequential(layer)):
        got = layer(x)
    assert (layer.record.slots >= 0).all()
    assert not torch.equal(got, want)


def test_expert_choice_has_capacities():
    message = "capacity_factor must be a number for ExpertChoice, got 'dropless'"
    with pytest.raises(ValueError, match=message):
        _layer(router="expert_choice")
    layer = _layer(router="expert_choice", capacity_factor=1.0)
    with pytest.raises(ValueError, match=message):
        vmoe_torch.set_routing(layer, eval_capacity_factor="dropless")


@pytest.mark.parametrize("value", ["none", "", 0, -1.0, float("inf"), None, True, [1.0]])
def test_other_words_are_refused(value):
    with pytest.raises(ValueError, match="capacity_factor must be above 0"):
        _layer(capacity_factor=value)
    layer = _layer()
    if value is not None:
        with pytest.raises(ValueError, match="eval_capacity_factor must be above 0"):
            vmoe_torch.set_routing(layer, capacity_factor=1.0, eval_capacity_factor=value)
    assert layer.capacity_factor == layer.eval_capacity_factor == "dropless"


def test_any_trained_model_can_be_switched():
    """And back; what was set travels in a state dict."""
    model, images = dropping(), grey_images()
    with torch.no_grad():
        before = model(images)
        with vmoe_torch.routing(model, capacity_factor="dropless"):
            got = model(images)
            assert all(stats["dropped"] == 0 for stats in vmoe_torch.routing_stats(model).values())
            state = json.loads(json.dumps(model.blocks[0].mlp.routing()))
        with vmoe_torch.routing(model, capacity_factor=4.0):
            torch.testing.assert_close(got, model(images))
        assert torch.equal(model(images), before)
        assert not torch.allclose(got, before)
        assert state["capacity_factor"] == state["eval_capacity_factor"] == "dropless"
        vmoe_torch.set_routing(model, capacity_factor="dropless")
        other = dropping()
        other.load_state_dict(model.state_dict())
        for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), got)
    assert "capacity_factor=dropless" in repr(model)


def test_a_model_may_have_it_in_some_layers():
    names = ("blocks.0.mlp", "blocks.1.mlp")
    model = dropping(eval_capacity_factor=dict(zip(names, ("dropless", 0.5))))
    model(grey_images())
    dropped = [stats["dropped"].item() for stats in vmoe_torch.routing_stats(model).values()]
    assert dropped[0] == 0
    assert dropped[1] > 0


def test_a_training_step_compiles_to_one_graph():
    x = torch.randn(4, 7, 16)
    want = _step(_layer(noise_std=0.0), x)
    layer = _layer(noise_std=0.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, tensor in zip(_step(compiled, x), want):
        torch.testing.assert_close(got, tensor)


def test_activation_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(4, 7, 16, requires_grad=True)
    layer = _layer().train()
    torch.manual_seed(5)
    layer(x).sin().sum().backward()
    want = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    torch.manual_seed(5)
    checkpoint(layer, x, use_reentrant=False).sin().sum().backward()
    got = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(torch.equal(*pair) for pair in zip(got, want))


# What records PyTorch's operators warns of much.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["export", "script", "trace"])
def test_recorded_graphs_give_every_expert_room_for_every_token(how):
    model, images = dropping(capacity_factor="dropless"), grey_images()
    with torch.no_grad():
        want = model(images)
        if how == "export":
            graph = torch.export.export(model, (images,)).module()
        else:
            graph = torch.jit.script(model) if how == "script" else torch.jit.trace(model, images)
        torch.testing.assert_close(graph(images), want, rtol=1e-5, atol=1e-5)


def test_the_exporter_takes_any_batch():
    from vmoe_torch.export import export_program

    model = dropping(capacity_factor="dropless", group_size="image")
    program = export_program(model, grey_images(2), dynamic_batch=True)
    with torch.no_grad():
        for count in (1, 5):
            torch.testing.assert_close(program.module()(grey_images(count)), model(grey_images(count)))


def test_meta_and_fake_forwards():
    layer = _layer(device="meta").eval()
    assert layer(torch.randn(4, 7, 16, device="meta")).shape == (4, 7, 16)


def test_flops_are_those_of_the_choices():
    model, images = dropping(capacity_factor="dropless"), grey_images(4)
    found = count_flops(model, images)
    (first, _) = vmoe_torch.moe_layers(model).values()
    tokens, (_, hidden, width) = 17, first.fc1.weight.shape
    want = 2 * tokens * (4 * width + 2 * 2 * width * hidden)
    assert set(found.layers.values()) == {want}
    assert forward_flops(model, 4) == 4 * found.total
    with vmoe_torch.routing(model, num_selected_experts=1):
        assert found.total - count_flops(model, images).total == 2 * 4 * tokens * width * hidden
    assert first.num_rows(68, 17) == 2 * 68
    # Its plain twin has room for every token at every expert.
    assert count_flops(dropping(capacity_factor="dropless", impl="reference"), images) == found


def by_threshold(**changes) -> nn.Module:
    """A model that has learnt its thresholds, in eval mode."""
    changes = {"eval_capacity_factor": "dropless", "router": "threshold", "mean_selected_experts": 2.0} | changes
    model = dropping(noise_std=0.0, **changes).train()
    with torch.no_grad():
        model(grey_images(16))
    return model.eval()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_flops_are_those_of_the_mean(impl):
    model, images = by_threshold(impl=impl), grey_images(4)
    first = model.blocks[0].mlp
    (_, hidden, width) = first.fc1.weight.shape
    full = count_flops(model, images)
    for mean in (1.5, 0.5):
        vmoe_torch.set_routing(model, mean_selected_experts=mean)
        found = count_flops(model, images)
        assert forward_flops(model, 4) < 4 * found.total  # of training, which has capacities
        assert first.num_rows(68, 17) == mean * 68
        assert found.dense == full.dense
        for name, layer in full.layers.items():
            assert layer - found.layers[name] == 4 * width * hidden * 17 * (2 - mean)
        kept = sum(int((layer.record.slots >= 0).sum()) for layer in vmoe_torch.moe_layers(model).values())
        # As many as these images have above the threshold.
        assert kept != mean * 2 * 68
        assert found.filled - found.total == 4 * width * hidden * (kept / 4 - mean * 2 * 17)
        assert count_flops(model.train(), images) == found
        model.eval()
    vmoe_torch.set_routing(model, mean_selected_experts=None, gate_threshold=0.5)
    assert count_flops(model, images).total == full.total


def test_slots_are_those_of_the_choices_above_the_threshold():
    model, data = by_threshold(), [(grey_images(4), torch.tensor([0, 1, 2, 3]))]
    full, half = evaluate(model, data, [RoutingSetting(), RoutingSetting(mean_selected_experts=0.5)])
    assert (full.capacity_factor, half.capacity_factor) == (1.0, 1.0)
    assert half.selected < 1 < full.selected
    assert half.flops.total < full.flops.total
    layer = model.blocks[0].mlp
    vmoe_torch.set_routing(model, mean_selected_experts=0.5)
    model(grey_images(4))
    assert layer.record.num_slots(4) == (layer.record.slots >= 0).sum() < 68


def test_a_budget_sees_what_a_mean_saves():
    settings = [LayerSetting(2, "dropless", True, mean) for mean in (None, 1.5, 1.0)]
    budget = vmoe_torch.set_budget(by_threshold(), flops=0.9, data=[grey_images(4)], settings=settings, rounds=1)
    present, full, some, half = (each.cost for each in budget.candidates[:4])
    assert half < some < full == present


def test_eval_shows_it_in_its_table():
    model, images = dropping(), grey_images(4)
    data = [(images, torch.tensor([0, 1, 2, 3]))]
    settings = [RoutingSetting("dropless"), RoutingSetting(0.5, batch_priority=True), RoutingSetting(4.0)]
    results = evaluate(model, data, settings)
    row, dropped, roomy = as_rows(results)
    assert row["capacity_factor"] == "dropless"
    assert (row["actual_capacity_factor"], row["dropped"], row["unprocessed"]) == (1.0, 0.0, 0.0)
    assert dropped["dropped"] > 0
    assert row["loss"] == pytest.approx(roomy["loss"], rel=1e-5)
    assert row["flops"] < roomy["flops"]
    line = format_table(results).splitlines()[2].split()
    assert line[1:3] == ["dropless", "1.000"]


def test_budget_starts_from_it():
    model, images = dropping(capacity_factor="dropless"), grey_images(4)
    budget = vmoe_torch.set_budget(model, flops=0.8, data=[images])
    assert budget.chosen.cost <= budget.limit
    assert "K=2 C=dropless BPR" in {str(setting) for each in budget.candidates for setting in each.settings.values()}
    assert "dropless" in f"{budget.present.settings} {budget}"
    budget.revert(model)
    assert {layer.eval_capacity_factor for layer in vmoe_torch.moe_layers(model).values()} == {"dropless"}


def test_plans_are_for_experts_on_one_rank():
    model = tiny_model(capacity_factor="dropless")
    run = PlannedRun(8, 1, 64)
    found = plan(model, run)
    assert found.flops_per_step == 3 * forward_flops(model, 8)
    assert all("ep=" not in text for text, _ in changes_that_fit(model, run))
    with pytest.raises(ValueError, match=r"capacity_factor must be a number with expert parallelism \(ep=2\)"):
        plan(model, PlannedRun(8, 2, 64))


def test_experts_on_other_ranks_are_refused():
    layer, x = _layer().eval(), torch.randn(4, 7, 16)
    want = layer(x)

    class Exchange:
        size = 1

        def local(self, weight):
            return weight

    layer.exchange = layer.own_router().exchange = exchange = Exchange()
    assert torch.equal(layer(x), want)
    exchange.size = 2
    message = (
        r"with expert parallelism \(ep=2\), got 'dropless': set one, e.g. by vmoe_torch.set_routing\(model, capaci"
    )
    with pytest.raises(ValueError, match=message):
        layer(x)
