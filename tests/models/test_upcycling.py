"""Dense models turned sparse: the same function at first, the original's own upcycling, and optimizer moments."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vmoe_torch
from tests.conftest import GOLDEN, golden_arrays, relative_error
from vmoe_torch.checkpoints import export_original, read_original, upcycle_optimizer

FOLDER = GOLDEN / "initialization"
EXACT = {"renormalize_gates": True, "capacity_factor": 8.0}


def _dense(name: str, **kwargs) -> nn.Module:
    """A model with random weights that all matter."""
    model = timm.create_model(name, **{"img_size": 64, "num_classes": 10, **kwargs})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def _tiny_vit() -> vmoe_torch.VMoE:
    """The shape of the golden .npz files."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "mlp_ratio": 2}
    return vmoe_torch.VMoE(**shape, num_classes=10, moe_layers=()).eval()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch16_224", {}),
        ("vit_base_patch16_224", {"depth": 3}),
        ("vit_small_patch14_dinov2", {"depth": 4, "img_size": 56}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 4, "img_size": 56}),
        ("vit_small_patch16_dinov3", {"depth": 4}),
        ("deit3_small_patch16_224", {"depth": 4}),
        ("vit_medium_patch16_gap_256", {"depth": 4}),
    ],
)
def test_upcycled_model_computes_the_same(name, kwargs):
    dense = _dense(name, **kwargs)
    sparse = vmoe_torch.upcycle(dense, "every2", num_experts=4, **EXACT)
    assert len(vmoe_torch.moe_layers(sparse)) == len(dense.blocks) // 2
    assert not sparse.training
    size = kwargs.get("img_size", 64)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert relative_error(sparse(x), dense(x)) <= 1e-5
        # Without renormalised gates it does not.
        assert relative_error(vmoe_torch.upcycle(dense, num_experts=4)(x), dense(x)) > 1e-3


def test_names_are_created_and_the_dense_model_stays():
    args = {"img_size": 32, "depth": 2, "num_classes": 0}
    sparse = vmoe_torch.upcycle("vit_tiny_patch16_224", (1,), 3, num_selected_experts=1, model_args=args)
    layer = sparse.blocks[1].mlp
    assert (layer.num_experts, layer.num_selected_experts, layer.activation) == (3, 1, "gelu")
    assert torch.equal(layer.fc1.weight[0], layer.fc1.weight[2])
    dense = _dense("vit_tiny_patch16_224", depth=2)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    sparse = vmoe_torch.upcycle(dense, (0, 1), 2, expert_noise=0.1)
    weight = sparse.blocks[0].mlp.fc1.weight
    assert not torch.equal(weight[0], weight[1])
    noise = weight - dense.blocks[0].mlp.fc1.weight
    assert abs(noise.std() / dense.blocks[0].mlp.fc1.weight.std() - 0.1) < 0.01
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert sparse.train()(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "kwargs", "got"),
    [
        ("vit_giant_patch14_dinov2", {"depth": 2}, "GluMlp|SwiGLU"),
        ("vit_tiny_patch16_224", {"depth": 2, "scale_mlp_norm": True}, "no norm inside.*LayerNorm"),
        ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56}, "GluMlp|SwiGLU"),
    ],
)
def test_other_mlps_are_refused(name, kwargs, got):
    with torch.device("meta"):
        dense = timm.create_model(name, **kwargs)
    with pytest.raises(ValueError, match=rf"blocks\.1\.mlp must .*({got})"):
        vmoe_torch.upcycle(dense)


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="model must have blocks with an mlp each"):
        vmoe_torch.upcycle(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must go with a model's name, got a Linear"):
        vmoe_torch.upcycle(nn.Linear(2, 2), pretrained=True)
    for noise in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"expert_noise must be finite and at least 0, got {noise}"):
            vmoe_torch.upcycle("vit_tiny_patch16_224", expert_noise=noise)
    parallel = timm.create_model("vit_small_patch16_18x2_224", img_size=32, depth=2)
    with pytest.raises(ValueError, match="got a VisionTransformer with ParallelThingsBlock as block 0"):
        vmoe_torch.upcycle(parallel)
    sparse = vmoe_torch.upcycle("vit_tiny_patch16_224", model_args={"depth": 2})
    with pytest.raises(ValueError, match="got MoeMlp"):
        vmoe_torch.upcycle(sparse)
    with pytest.raises(ValueError, match="renormalize_gates must be False unless"):
        vmoe_torch.upcycle(_dense("vit_tiny_patch16_224", depth=2), router="expert_choice", renormalize_gates=True)


@pytest.mark.parametrize("file", ["tiny_vit.npz", "tiny_vit_released_names.npz"])
def test_plain_vit_upcycles_as_the_original_does(file, tmp_path):
    want = golden_arrays("initialization", "upcycle_from_vit_npz")
    dense = _tiny_vit()
    dense.load_pretrained(str(FOLDER / file))
    x = torch.from_numpy(want["inputs"]).permute(0, 3, 1, 2)
    assert relative_error(dense(x), want["vit_logits"]) <= 1e-5
    sparse = vmoe_torch.upcycle(
        dense, (1, 3), 4, num_selected_experts=2, capacity_factor=1.05, batch_priority=False, group_size=4
    )
    for index in (1, 3):
        router = torch.from_numpy(want[f"target/Encoder/encoderblock_{index}/Moe/Router/dense/kernel"])
        sparse.blocks[index].mlp.router.weight.data.copy_(router.t())
    assert relative_error(sparse(x), want["logits"]) <= 1e-5
    export_original(sparse, tmp_path / "x")
    got = read_original(str(tmp_path / "x"))
    outputs = {name.removeprefix("output/"): array for name, array in want.items() if name.startswith("output/")}
    assert len(outputs) == 17
    assert all(np.array_equal(got[name].numpy(), array) for name, array in outputs.items())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_moments_are_copied_to_every_expert(kind):
    def optimizer(model):
        if kind == "adamw":
            return torch.optim.AdamW(model.parameters(), 1e-3)
        return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    dense = _dense("vit_tiny_patch16_224", depth=2, embed_dim=24, img_size=32)
    first = optimizer(dense)
    x = torch.randn(2, 3, 32, 32)
    dense(x).square().sum().backward()
    first.step()
    sparse = vmoe_torch.upcycle(dense, num_experts=3, **EXACT)
    second = optimizer(sparse)
    upcycle_optimizer(first, dense, second, sparse)
    key = "exp_avg_sq" if kind == "adamw" else "momentum_buffer"
    old, new = dense.blocks[1].mlp.fc1, sparse.blocks[1].mlp.fc1
    for name in ("weight", "bias"):
        want = first.state[getattr(old, name)][key]
        assert want.abs().max() > 0
        assert torch.equal(second.state[getattr(new, name)][key], torch.stack([want] * 3))
    assert torch.equal(second.state[sparse.cls_token][key], first.state[dense.cls_token][key])
    assert sparse.blocks[1].mlp.router.weight not in second.state
    sparse(x).square().sum().backward()
    second.step()
    if kind == "adamw":
        assert second.state[sparse.cls_token]["step"] == 2
        assert first.state[dense.cls_token]["step"] == 1
    with pytest.raises(ValueError, match=r"cls_token must be \(1, 1, 24\) or a number of them"):
        upcycle_optimizer(first, dense, second, vmoe_torch.upcycle(_dense("vit_tiny_patch16_224", depth=2)))


def test_moments_that_cannot_be_copied_are_refused():
    dense = _dense("vit_tiny_patch16_224", depth=2, embed_dim=24, img_size=32)
    sparse = vmoe_torch.upcycle(dense, num_experts=3)
    first = torch.optim.Adafactor(dense.parameters())
    dense(torch.randn(2, 3, 32, 32)).square().sum().backward()
    first.step()
    second = torch.optim.Adafactor(sparse.parameters())
    with pytest.raises(ValueError, match=r"row_var of blocks\.1\.mlp\.fc1\.weight must be \(96, 24\).*got \(96, 1\)"):
        upcycle_optimizer(first, dense, second, sparse)
    assert not second.state
    with pytest.raises(ValueError, match="both optimizers must be of one kind, got Adafactor and SGD"):
        upcycle_optimizer(first, dense, torch.optim.SGD(sparse.parameters(), 0.1), sparse)


def test_experts_biases_are_not_decayed():
    """They are 2-D, which timm's groups by layer take for weights."""
    dense = _dense("vit_tiny_patch16_224", depth=2, embed_dim=24, img_size=32)
    sparse = pickle.loads(pickle.dumps(copy.deepcopy(vmoe_torch.upcycle(dense, num_experts=3))))
    assert sparse.no_weight_decay() > dense.no_weight_decay()
    optimizer = timm.optim.create_optimizer_v2(sparse, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.7)
    names = {parameter: name for name, parameter in sparse.named_parameters()}
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert "blocks.1.mlp.fc1.weight" in decayed
    assert not any(name.endswith(".bias") for name in decayed)


def test_plain_vit_of_bfloat16_is_loaded(tmp_path):
    """Numpy writes bfloat16 as bytes without a type."""
    with np.load(FOLDER / "tiny_vit.npz") as file:
        arrays = {name: torch.from_numpy(file[name]).bfloat16() for name in file.files}
    np.savez(tmp_path / "x.npz", **{name: a.view(torch.uint16).numpy().view("V2") for name, a in arrays.items()})
    model = _tiny_vit()
    model.load_pretrained(str(tmp_path / "x.npz"))
    assert torch.equal(model.head.weight, arrays["head/kernel"].t().float())


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "no archive"])
def test_damaged_npz_files_are_named(damage, tmp_path):
    path, data = tmp_path / "x.npz", (FOLDER / "tiny_vit.npz").read_bytes()
    half = len(data) // 2
    contents = {
        "empty": b"",
        "cut": data[:half],
        "flipped": data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :],
        "no archive": b"hello",
    }
    if damage != "missing":
        path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=r"x\.npz must be a readable \.npz file, got"):
        _tiny_vit().load_pretrained(str(path))


def test_hybrid_vit_is_refused(tmp_path):
    with np.load(FOLDER / "tiny_vit.npz") as file:
        np.savez(tmp_path / "x.npz", **{name: file[name] for name in file.files}, **{"conv_root/kernel": np.zeros(3)})
    with pytest.raises(ValueError, match=r"x\.npz: parameter path must be one .*, got 'conv_root/kernel'"):
        _tiny_vit().load_pretrained(str(tmp_path / "x.npz"))
