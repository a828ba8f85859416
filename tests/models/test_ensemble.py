"""E3: members routed apart equal the original's block-diagonal routing; probabilities are averaged."""

import numpy as np
import pytest
import safetensors.torch
import torch

import vmoe_torch
from vmoe_torch.checkpoints import (
    convert,
    export_original,
    load_original,
    read_original,
    read_weights,
    write_original,
)
from vmoe_torch.models import VMoE, VMoEEnsemble
from vmoe_torch.models.architecture import open_weights
from vmoe_torch.models.ensemble import EnsembleMoeMlp, average_members

TINY = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "moe_layers": "last2",
    "num_experts": 8,
    "num_selected_experts": 1,
    "group_size": "batch",
}


def _block_diagonal(x, router, fc1, b1, fc2, b2, members, selected, factor):
    """The original's formulation in numpy: one group of (B, L, M) tokens, all E experts, gates 0 outside the member's.

    x: (B * M, L, D), router (D, M, E / M), fc1 (E, D, H), fc2 (E, H, D); position order; relu.
    """
    images, tokens, dim = x.shape
    experts = fc1.shape[0]
    flat = x.reshape(images // members, members, tokens, dim).transpose(0, 2, 1, 3).reshape(-1, dim)
    gates = np.zeros((len(flat), experts))
    share = experts // members
    for row, token in enumerate(flat):
        member = row % members
        logits = token @ router[:, member]
        part = np.exp(logits - logits.max())
        gates[row, member * share : (member + 1) * share] = part / part.sum()
    capacity = int(np.ceil(len(flat) * selected * factor / experts))
    order = np.argsort(-gates, axis=1, kind="stable")
    used = np.zeros(experts, int)
    out = np.zeros_like(flat)
    for rank in range(selected):
        for row in range(len(flat)):
            expert = order[row, rank]
            used[expert] += 1
            if used[expert] <= capacity:
                hidden = np.maximum(flat[row] @ fc1[expert] + b1[expert], 0)
                out[row] += gates[row, expert] * (hidden @ fc2[expert] + b2[expert])
    return out.reshape(images // members, tokens, members, dim).transpose(0, 2, 1, 3).reshape(x.shape)


@pytest.mark.parametrize(("members", "selected"), [(2, 1), (2, 2), (4, 1)])
def test_members_equal_block_diagonal_routing(members, selected):
    layer = EnsembleMoeMlp(
        6,
        10,
        ensemble_size=members,
        num_experts=8,
        num_selected_experts=selected,
        capacity_factor=0.8,
        capacity_multiple_of=1,
        batch_priority=False,
        group_size="batch",
        act_layer="relu",
        importance_loss_weight=0.0,
        load_loss_weight=0.0,
        gshard_loss_weight=0.0,
        dtype=torch.float64,
    ).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3 * members, 7, 6, dtype=torch.float64)

    def of(name):
        return torch.cat([member.get_parameter(name) for member in layer.members]).detach().numpy()

    router = of("router.weight").reshape(members, -1, 6).transpose(2, 0, 1)
    fc1, fc2 = (of(f"{name}.weight").transpose(0, 2, 1) for name in ("fc1", "fc2"))
    want = _block_diagonal(x.numpy(), router, fc1, of("fc1.bias"), fc2, of("fc2.bias"), members, selected, factor=0.8)
    assert np.abs(layer(x).detach().numpy() - want).max() <= 1e-12 * np.abs(want).max()


def _model(**kwargs) -> VMoEEnsemble:
    model = VMoEEnsemble(**{**TINY, **kwargs}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_inference_averages_the_members_probabilities():
    model = _model()
    x = torch.randn(3, 3, 32, 32)
    out = model(x)
    assert torch.allclose(out.sum(1), torch.ones(3))
    model.ensemble_output = "members"
    logits = model(x)
    assert logits.shape == (6, 5)
    want = logits.view(3, 2, 5).softmax(-1).mean(1)
    assert not torch.allclose(logits[0], logits[1])
    assert torch.allclose(out, want, atol=1e-6)
    model.ensemble_output = "log_probabilities"
    assert torch.allclose(model(x), want.log(), atol=1e-5)
    # Far beyond what exp can hold.
    assert torch.equal(average_members(torch.tensor([[1e4, 0.0], [0.0, 1e4]]), 2), torch.tensor([[0.5, 0.5]]))


def test_training_gives_every_members_logits_and_a_gradient():
    model = _model().train()
    model(torch.randn(3, 3, 32, 32)).square().sum().backward()
    assert model(torch.randn(3, 3, 32, 32)).shape == (6, 5)
    assert all(parameter.grad is not None for parameter in model.parameters())
    # The batch is repeated before the first sparse block only, and not again.
    assert [block.repeats for block in model.blocks] == [1, 2, 1, 1]
    assert len(vmoe_torch.moe_layers(model)) == 4


@pytest.mark.parametrize("router", ["per member", "flat"])
def test_ensemble_checkpoints_are_loaded(router, tmp_path):
    """Fine-tuned files hold routers as (D, M, E / M); those that fine-tuning begins from may hold (D, E)."""
    model = _model()
    export_original(model, tmp_path / "x", num_shards=2)
    arrays = read_original(str(tmp_path / "x"))
    name = "Encoder/encoderblock_3/Moe/Router/dense/kernel"
    assert arrays[name].shape == (16, 2, 4)
    assert arrays["Encoder/encoderblock_3/Moe/Mlp/Dense_0/kernel"].shape == (8, 16, 32)
    assert torch.equal(arrays[name][:, 1].t(), model.blocks[3].mlp.members[1].router.weight)
    if router == "flat":
        arrays = {path: a.flatten(1) if "Router" in path else a for path, a in arrays.items()}
        write_original(tmp_path / "x", arrays)
    other = _model()
    load_original(tmp_path / "x", other)
    want = model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in other.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x), model(x))


def test_ensembles_are_refused_where_they_cannot_be():
    with pytest.raises(ValueError, match="num_experts must be a multiple of ensemble_size=3, got 8"):
        VMoEEnsemble(**TINY, ensemble_size=3)
    with pytest.raises(ValueError, match="moe_layers must name at least one block for an ensemble, got none"):
        VMoEEnsemble(**{**TINY, "moe_layers": ()})
    with pytest.raises(ValueError, match="ensemble_output must be one of"):
        VMoEEnsemble(**TINY, ensemble_output="logits")


def test_converted_ensembles_have_the_names_of_the_model(tmp_path):
    model = _model()
    export_original(model, tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "x.safetensors")
    assert safetensors.torch.load_file(tmp_path / "x.safetensors").keys() == model.state_dict().keys()
    opened = open_weights(read_weights(tmp_path / "x.safetensors"))[0]
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in model.state_dict().items())
    # Heads that are given where the file says them cost nothing.
    export_original(tmp_path / "x.safetensors", tmp_path / "y", num_heads=2)
    want, got = read_original(str(tmp_path / "x")), read_original(str(tmp_path / "y"))
    assert {name: a.shape for name, a in got.items()} == {name: a.shape for name, a in want.items()}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("members", [1, 4])
def test_ensemble_checkpoints_are_refused_by_other_models(members, converted, tmp_path):
    """Experts of two groups that become those of one, or of four, would compute something else."""
    export_original(_model(), tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "x.safetensors")
    other = VMoE(**TINY) if members == 1 else _model(ensemble_size=members)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"must be loaded into an ensemble of 2 members, got {members}"):
        load_original(tmp_path / ("x.safetensors" if converted else "x"), other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
