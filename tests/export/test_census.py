"""Every expert survives an export, and no operator depends on data; what is gone or does is told."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import vmoe_torch
from tests.export.test_export import CASES, SAVE, SHAPE
from vmoe_torch.export import count_experts, export_program, save_onnx
from vmoe_torch.layers import ROUTERS

EXPORTED = {
    **CASES,
    "images": {"group_size": "image"},
    "no biases": {"proj_bias": False},
    "by threshold": {"router": "threshold", "mean_selected_experts": 1.5, "group_size": 4},
    "shared": {"shared_expert_hidden": 0.5},
    "soft": {"router": "soft", "slots_per_expert": 2, "capacity_factor": 1.05},
}


def test_every_router_has_a_case():
    assert {case.get("router", "top_experts") for case in EXPORTED.values()} == set(ROUTERS)


@pytest.mark.parametrize("case", EXPORTED)
def test_every_expert_is_there(build, tmp_path, case):
    model = build(**EXPORTED[case])
    dynamic = model.blocks[0].mlp.group_size == 1
    program = export_program(model, torch.zeros(SHAPE), dynamic_batch=dynamic)
    want = dict.fromkeys(vmoe_torch.moe_layers(model), 4)
    assert count_experts(program, model) == want
    for suffix, save in SAVE.items():
        save(program, tmp_path / f"x{suffix}")
        assert count_experts(tmp_path / f"x{suffix}", model) == want


@pytest.mark.parametrize("key", ["fc1.weight", "fc1.bias", "fc2.weight", "router.weight"])
@pytest.mark.parametrize("suffix", SAVE)
def test_another_expert_is_missed(build, tmp_path, suffix, key):
    """One weight of one expert differs."""
    model = build()
    path = tmp_path / f"x{suffix}"
    SAVE[suffix](export_program(model, torch.zeros(SHAPE)), path)
    model.blocks[0].mlp.get_parameter(key).data[2] += 1
    said = f"blocks.0.mlp.{key}" + (" of expert 2" if key in ("fc1.weight", "fc2.weight") else "")
    with pytest.raises(ValueError, match=f"x{suffix} must hold {said} on a way to its output"):
        count_experts(path, model)


def test_pruned_and_averaged_models(tmp_path, build):
    model = vmoe_torch.prune_experts(build(depth=2), {"blocks.0.mlp": [1, 3]})
    program = export_program(model, torch.zeros(SHAPE))
    assert count_experts(program, model) == {"blocks.0.mlp": 2, "blocks.1.mlp": 4}
    dense = vmoe_torch.to_dense(model)
    save_onnx(export_program(dense, torch.zeros(SHAPE)), tmp_path / "x.onnx")
    assert count_experts(tmp_path / "x.onnx", dense) == {}


class _Around(nn.Module):
    def __init__(self, model: nn.Module, how: str):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x):
        if self.how == "branch":
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)).mean((1, 2, 3)) + self.model(x)[:, 0]
        if self.how == "mask":
            return self.model(x)[:, 0].sum() + x[x > 0].sum()
        if self.how == "nonzero":
            return self.model(x)[:, 0].sum() + x.nonzero().sum()
        return x


@pytest.mark.parametrize(
    ("how", "said"),
    [("branch", "cond"), ("mask", "aten.index.Tensor|nonzero"), ("nonzero", "aten.nonzero.default")],
)
def test_what_depends_on_data_is_told(build, how, said):
    model = _Around(build(impl="reference"), how)
    program = torch.export.export(model, (torch.randn(SHAPE),))
    with pytest.raises(ValueError, match=f"the program must have no operator that depends on data, got.*({said})"):
        count_experts(program, model)


def test_what_depends_on_data_is_told_of_onnx(build, tmp_path):
    model, path = build(), tmp_path / "x.onnx"
    save_onnx(export_program(model, torch.zeros(SHAPE)), path)
    file = onnx.load(path)
    file.graph.node.insert(0, onnx.helper.make_node("NonZero", ["images"], ["where"]))
    onnx.save(file, path)
    with pytest.raises(ValueError, match="must have no operator that depends on data, got NonZero"):
        count_experts(path, model)


def test_a_weight_beside_the_way_to_the_output_is_missed(build, tmp_path):
    """Its layer is in the file, and nobody reads what it makes; or only a part of it is read."""
    model = build(impl="reference")
    with pytest.raises(ValueError, match=r"must hold model\.blocks\.0\.mlp\.\S+ .*on a way to its output"):
        count_experts(torch.export.export(_Around(model, "none"), (torch.randn(SHAPE),)), _Around(model, "none"))
    save_onnx(export_program(model, torch.zeros(SHAPE)), tmp_path / "x.onnx")
    file = onnx.load(tmp_path / "x.onnx")
    bias = model.blocks[0].mlp.fc1.bias.detach().numpy()
    arrays = {each.name: onnx.numpy_helper.to_array(each).squeeze() for each in file.graph.initializer}
    (stored,) = (name for name, array in arrays.items() if np.array_equal(array, bias))
    for node in file.graph.node:
        node.input[:] = ["part" if name == stored else name for name in node.input]
    file.graph.node.insert(0, onnx.helper.make_node("Gather", [stored, "number"], ["part"]))
    onnx.save(file, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"must hold blocks\.0\.mlp\.fc1\.bias on a way"):
        count_experts(tmp_path / "x.onnx", model)
