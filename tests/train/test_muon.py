"""Muon of experts: every matrix of a stack is updated as timm's Muon updates it alone."""

import copy

import pytest
import timm
import torch
from timm.optim.muon import Muon
from torch.overrides import TorchFunctionMode

import vmoe_torch
from vmoe_torch.train import create_muon, muon
from vmoe_torch.train.muon import FloatProducts


def model_of(**kwargs):
    torch.manual_seed(0)
    model = vmoe_torch.VMoE(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, **{"num_experts": 4, **kwargs}
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    # The routers' noise.
    torch.manual_seed(seed)
    model(torch.randn(8, 3, 16, 16, generator=generator)).square().sum().backward()


def stacks(model):
    """The experts' weights by name."""
    return {name: each for name, each in model.named_parameters() if ".mlp.fc" in name and each.ndim == 3}


@pytest.mark.parametrize("opt", ["muon", "nmuon", "adamuon", "nadamuon"])
@pytest.mark.parametrize("kwargs", [{}, {"expert_hidden": (0.5, 0.5, 1.0, 1.0)}, {"router": "soft"}], ids=str)
def test_each_expert_is_updated_as_timm_updates_its_matrix(opt, kwargs):
    model = model_of(**kwargs)
    options = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = create_muon(model, opt, **options)
    alone = {
        name: [torch.nn.Parameter(each.clone()) for each in stack.detach()] for name, stack in stacks(model).items()
    }
    start = {name: stack.detach().clone() for name, stack in stacks(model).items()}
    assert len(alone) == (4 if "expert_hidden" in kwargs else 2)
    reference = timm.optim.create_optimizer_v2(
        [each for matrices in alone.values() for each in matrices], opt, **options
    )
    for seed in range(3):
        backward(model, seed)
        for name, stack in stacks(model).items():
            for matrix, gradient in zip(alone[name], stack.grad):
                matrix.grad = gradient.clone()
        optimizer.step()
        with muon.products(reference):
            reference.step()
    for name, stack in stacks(model).items():
        want = torch.stack(tuple(alone[name]))
        if "ada" in opt:
            # AdaMuon gives a parameter's update a norm, here the whole stack's.
            assert (stack - want).norm() < 0.1 * (want - start[name]).norm(), name
        else:
            assert torch.equal(stack, want), name


def test_what_is_left_to_adamw():
    model = model_of(shared_expert_hidden=0.5)
    fallback = {
        name
        for group in create_muon(model, lr=0.01, fallback_list=["head.*"]).param_groups
        for name, parameter in model.named_parameters()
        if group.get("use_fallback") and any(parameter is each for each in group["params"])
    }
    biases = {f"blocks.1.mlp.{part}.bias" for part in ("fc1", "fc2", "shared_expert.fc1", "shared_expert.fc2")}
    assert fallback == {"blocks.1.mlp.router.weight", "head.weight", "head.bias", *biases}


def test_a_user_may_leave_the_experts_to_adamw():
    model = model_of()
    optimizer = create_muon(model, lr=0.01, fallback_list=["blocks.1.mlp.fc1.*"])
    backward(model)
    optimizer.step()
    assert "exp_avg" in optimizer.state[model.blocks[1].mlp.fc1.weight]
    assert "momentum_buffer" in optimizer.state[model.blocks[1].mlp.fc2.weight]


def test_a_model_without_experts_is_timms():
    models = [model_of(moe_layers=()) for _ in range(2)]
    optimizers = create_muon(models[0], lr=0.01), timm.optim.create_optimizer_v2(models[1], "muon", lr=0.01)
    for model, optimizer in zip(models, optimizers):
        backward(model)
        with muon.products(optimizer):
            optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(ours, theirs)


def test_frozen_and_idle_experts_stay():
    model = model_of()
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    before = {name: each.detach().clone() for name, each in stacks(model).items()}
    optimizer = create_muon(model, lr=0.01)
    backward(model)
    # Who got no token has no gradient; without decay nothing moves it.
    model.blocks[1].mlp.fc2.weight.grad[2] = 0.0
    optimizer.step()
    after = stacks(model)
    assert torch.equal(after["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])
    moved = (after["blocks.1.mlp.fc2.weight"] != before["blocks.1.mlp.fc2.weight"]).flatten(1).any(1)
    assert moved.tolist() == [True, True, False, True]


def test_what_it_keeps_has_the_parameters_shape_and_goes_on_from_a_state_dict():
    models = [model_of()]
    optimizers = [create_muon(models[0], "adamuon", lr=0.01)]
    backward(models[0])
    optimizers[0].step()
    assert len(optimizers[0].state) == len(list(models[0].parameters()))
    for parameter, state in optimizers[0].state.items():
        for name, each in state.items():
            if isinstance(each, torch.Tensor) and each.ndim > 0:
                assert (each.shape, each.stride()) == (parameter.shape, parameter.stride()), name
    models.append(copy.deepcopy(models[0]))
    optimizers.append(create_muon(models[1], "adamuon", lr=0.01))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers):
        backward(model, seed=1)
        optimizer.step()
    for one, other in zip(*(model.parameters() for model in models)):
        assert torch.equal(one, other)


def test_a_failing_step_leaves_the_groups_as_they_were(monkeypatch):
    model = model_of()
    optimizer = create_muon(model, lr=0.01)
    backward(model)
    optimizer.step()

    def fail(*_, **__):
        raise RuntimeError("no step")

    monkeypatch.setattr(Muon, "step", fail)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert (
        {id(each) for each in held}
        == {id(each) for each in model.parameters()}
        == {id(each) for each in optimizer.state}
    )


def test_hooks_of_a_step_run_once():
    model = model_of()
    optimizer = create_muon(model, lr=0.01)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    backward(model)
    optimizer.step()
    assert seen == ["before", "after"]


def test_closure_computes_the_gradients():
    model = model_of()
    optimizer = create_muon(model, lr=0.01)
    before = model.blocks[1].mlp.fc1.weight.detach().clone()

    def closure():
        backward(model)
        return torch.tensor(3.0)

    assert optimizer.step(closure).item() == 3.0
    assert not torch.equal(model.blocks[1].mlp.fc1.weight, before)


def test_other_optimisers_are_refused():
    with pytest.raises(ValueError, match="opt must be one of timm's Muon optimisers, got 'adamw'"):
        create_muon(model_of(), "adamw", lr=0.01)


class Dtypes(TorchFunctionMode):
    """Notes what the products of matrices multiply."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.addmm, torch.baddbmm):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("instructions", [False, True])
def test_products_of_bfloat16_without_instructions_are_made_of_float32(instructions, monkeypatch):
    """Number by number, an update of the recipe `typefaces` takes three times as long."""
    monkeypatch.setattr(muon, "has_products", lambda dtype: instructions)
    model = model_of()
    optimizer = create_muon(model, lr=0.01)
    backward(model)
    with Dtypes() as dtypes:
        optimizer.step()
    assert dtypes.seen == {torch.bfloat16 if instructions else torch.float32}


@pytest.mark.parametrize("shape", [(24, 40), (6, 24, 40)], ids=str)
def test_a_product_of_float32_is_rounded_once(shape):
    generator = torch.Generator().manual_seed(0)
    before, factor, other = (torch.randn(shape, generator=generator).bfloat16() for _ in range(3))
    product = torch.addmm if len(shape) == 2 else torch.baddbmm
    square = factor[..., :24].contiguous()
    want = (0.5 * before.double() + 2.0 * square.double() @ other.double()).bfloat16()
    with FloatProducts():
        out = product(before, square, other, beta=0.5, alpha=2.0, out=torch.empty_like(before))
    assert out.dtype is torch.bfloat16
    # Float32's own rounding moves a number over the middle between two of bfloat16 now and then.
    assert (out == want).float().mean() > 0.99
    torch.testing.assert_close(out, want, rtol=2**-7, atol=0)


def test_other_products_are_left_alone():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.float16):
        a, out = torch.randn(4, 4, generator=generator).to(dtype), torch.empty(4, 4, dtype=dtype)
        want = torch.addmm(a, a, a)
        with FloatProducts():
            assert torch.equal(torch.addmm(a, a, a, out=out), want)
            assert torch.equal(torch.addmm(a, a, a), want)


def test_a_gpu_multiplies_as_timm_does_whatever_its_host(monkeypatch):
    monkeypatch.setattr(muon, "has_products", lambda dtype: False)
    assert isinstance(muon.products(create_muon(model_of())), FloatProducts)
    assert not isinstance(muon.products(create_muon(model_of().to("meta"))), FloatProducts)
