"""What a layer remembers can be read after the forward, wherever that ran."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vmoe_torch
from vmoe_torch.layers import MoeMlp

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*non-contiguous:UserWarning")
X = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(2))


def layer(**kwargs):
    torch.manual_seed(0)
    settings = {"capacity_factor": 0.5, "capacity_multiple_of": 1, "group_size": "image", "noise_std": 0.0}
    return torch.nn.Sequential(MoeMlp(8, 16, num_experts=4, **{**settings, **kwargs})).eval()


def assert_same_statistics(model, want):
    got = vmoe_torch.routing_stats(model)["0"]
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("router", ["top_experts", "expert_choice"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dim", [0, 1])
def test_statistics_after_vmap_are_those_of_all_samples(router, impl, dim):
    model = layer(router=router, impl=impl)
    model(X)
    want = vmoe_torch.routing_stats(model)["0"]
    torch.vmap(lambda image: model(image.unsqueeze(0)), in_dims=dim)(X.movedim(0, dim))
    assert_same_statistics(model, want)
    assert model[0].record.gates.shape[0] == 5 * 7


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jacrev", "functional_call", "inference_mode"])
def test_statistics_after_a_transform(transform):
    model = layer(impl="reference")
    model(X)
    want = vmoe_torch.routing_stats(model)["0"]

    def loss(image):
        return model(image.view(-1, 7, 8)).square().sum()

    if transform == "grad":
        torch.func.grad(loss)(X)
    elif transform == "vmap of grad":
        torch.vmap(torch.func.grad(loss))(X)
    elif transform == "jacrev":
        torch.func.jacrev(lambda x: model(x).sum((0, 1)))(X)
    elif transform == "functional_call":
        parameters = dict(model.named_parameters())
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (X,)).sum())(parameters)
    else:
        with torch.inference_mode():
            model(X)
    assert_same_statistics(model, want)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(model[0].record.importance)


def test_statistics_without_values_are_refused():
    model = layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(2, 7, 8))
    with pytest.raises(ValueError, match="must have had values to give statistics, got a FakeTensor on cpu in 0"):
        vmoe_torch.routing_stats(model)
    model.to("meta")(X.to("meta"))
    with pytest.raises(ValueError, match="must have had values to give statistics, got a Tensor on meta in 0"):
        vmoe_torch.routing_stats(model)


def test_manual_loss_stays_in_the_transform():
    """Its gradient is taken inside the function that is transformed."""
    model = layer(impl="reference", auxiliary_mode="manual").train()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return 0 * torch.func.functional_call(model, parameters, (X,)).sum() + vmoe_torch.auxiliary_loss(model)

    got = torch.func.grad(loss)(parameters)["0.router.weight"]
    model(X)
    vmoe_torch.auxiliary_loss(model).backward()
    torch.testing.assert_close(got, model[0].router.weight.grad)
    assert got.abs().sum() > 0


def test_kept_experts_are_those_of_the_choices_with_and_without_capacities():
    layer = MoeMlp(8, num_experts=4, num_selected_experts=2, capacity_factor=50.0).eval()
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(2, 5, 8)
    counts = []
    for factor in (50.0, "dropless", 0.5):
        layer.choose_routing({"capacity_factor": factor, "eval_capacity_factor": None})
        layer(x)
        kept = layer.record.slots >= 0
        assert torch.equal(layer.record.kept_experts(), layer.record.experts[kept].long())
        counts.append((layer.record.kept_experts().bincount(minlength=4).tolist(), layer.record.num_slots(4)))
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] == 20 < counts[0][1]
    chosen = MoeMlp(8, num_experts=4, router="expert_choice", capacity_factor=1.0, group_size="image").eval()
    chosen(x)
    assert chosen.record.kept_experts().bincount(minlength=4).tolist() == [chosen.record.groups.rows] * 4
