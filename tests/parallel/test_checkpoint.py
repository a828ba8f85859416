"""Checkpoints that know no number of ranks, weights made part by part, and the one-file export."""

import errno
import json
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint import FileSystemWriter

import vmoe_torch
from tests.parallel.processes import run
from vmoe_torch.parallel import (
    ShardedCheckpoints,
    build_mesh,
    export_safetensors,
    load_checkpoint,
    materialize,
    parallelize,
    parameter_groups,
)

IMAGES = 4
OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MOE = {"num_experts": 4, "group_size": 1, "noise_std": 0.0}


def _model():
    torch.manual_seed(0)
    model = vmoe_torch.VMoE(**OPTIONS, **MOE).double()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    for layer in vmoe_torch.moe_layers(model).values():
        torch.nn.init.normal_(layer.fc1.weight, std=0.1)
    return model


def _optimizer(model):
    groups = [{"params": list(model.parameters())}]
    return torch.optim.AdamW(parameter_groups(groups), lr=1e-3, weight_decay=0.05)


def _steps(model, optimizer, first, count, dp=1, ep=1):
    """Steps on images that only the step decides, each rank on its part."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dp * ep > 1 else (1, 0)
    mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(IMAGES, 3, 16, 16, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (IMAGES,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        optimizer.step()


def _whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def _snapshot(model, optimizer):
    """Weights and moments; the key bias has no gradient, and Adam blows its rounding up to steps."""
    found = {}
    for name, parameter in model.named_parameters():
        if not name.endswith("qkv.bias"):
            found[name] = _whole(parameter.detach())
            found[f"{name} first"] = _whole(optimizer.state[parameter]["exp_avg"])
            found[f"{name} second"] = _whole(optimizer.state[parameter]["exp_avg_sq"])
            found[f"{name} step"] = optimizer.state[parameter]["step"].clone()
    return found


def _save_spread(folder):
    """Two steps at ep = ranks, a checkpoint that later steps must not reach, and two more steps."""
    ep = dist.get_world_size()
    spread = parallelize(_model(), build_mesh(1, ep, "cpu"))
    optimizer = _optimizer(spread)
    _steps(spread, optimizer, 0, 2, ep=ep)
    checkpoints = ShardedCheckpoints(folder / "checkpoints", keep=2)
    checkpoints.save(2, spread, optimizer, {"update": 2, "names": ["a", "b"]})
    saved = _snapshot(spread, optimizer)
    _steps(spread, optimizer, 2, 2, ep=ep)
    checkpoints.wait()
    export_safetensors(spread, folder / "model.safetensors")
    ended = _snapshot(spread, optimizer)
    if dist.get_rank() == 0:
        torch.save((saved, ended), folder / "expected.pt")
    dist.barrier()
    return spread, optimizer


def _resume_all(folder, meshes):
    for dp, ep in meshes:
        _resume(folder, dp, ep)


def _resume(folder, dp, ep):
    saved, ended = torch.load(folder / "expected.pt")
    model = _model()
    torch.nn.init.zeros_(model.head.weight)
    if dp * ep > 1:
        model = parallelize(model, build_mesh(dp, ep, "cpu"))
    optimizer = _optimizer(model)
    state = ShardedCheckpoints(folder / "checkpoints", keep=2).load(model, optimizer)
    assert state == {"update": 2, "names": ["a", "b"]}
    for name, tensor in _snapshot(model, optimizer).items():
        assert torch.equal(tensor, saved[name]), name
    _steps(model, optimizer, 2, 2, dp, ep)
    for name, tensor in _snapshot(model, optimizer).items():
        torch.testing.assert_close(tensor, ended[name], rtol=1e-9, atol=1e-12, msg=name)


def _damage(folder, model, optimizer):
    """Keeps the last two; one with a changed byte and a half-written one are skipped by name."""
    checkpoints = ShardedCheckpoints(folder, keep=2)
    for update in (2, 3, 4):
        checkpoints.save(update, model, optimizer, {"update": update})
    checkpoints.wait()
    numbered = sorted(path.name for path in folder.iterdir())
    assert numbered == ["update_00000003", "update_00000004"]
    # Nobody may look at the folder once it is damaged.
    dist.barrier()
    if dist.get_rank() == 0:
        newest = folder / "update_00000004"
        name = max(json.loads((newest / "complete.json").read_text()).items(), key=lambda item: item[1][0])[0]
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
        (folder / ".update_00000005").mkdir()
    dist.barrier()
    if dist.get_rank() == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert checkpoints.load(model, optimizer) == {"update": 3}
        half, damaged = (str(warning.message) for warning in caught if "skipped" in str(warning.message))
        assert half == f"checkpoint {folder / '.update_00000005'} is half-written, skipped"
        assert damaged == f"checkpoint {newest} is damaged, skipped: {name} has changed"
    else:
        assert checkpoints.load(model, optimizer) == {"update": 3}


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_disk(folder, model, optimizer):
    """The disk of rank 1 is full: every rank hears of it, and the checkpoint before stays."""
    checkpoints = ShardedCheckpoints(folder, keep=1)
    checkpoints.save(1, model, optimizer, {})
    checkpoints.wait()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", _no_space)
        checkpoints.save(2, model, optimizer, {})
        with pytest.raises(OSError, match=r"cannot be written: rank 1: OSError: .*No space left on device"):
            checkpoints.wait()
    assert [path.name for path in checkpoints.usable()] == ["update_00000001"]
    dist.barrier()
    checkpoints.save(3, model, optimizer, {})
    checkpoints.wait()
    assert [path.name for path in folder.iterdir()] == ["update_00000003"]


def _made_in_parts(folder):
    with torch.device("meta"):
        model = vmoe_torch.VMoE(**OPTIONS, **MOE)
    parallelize(model, build_mesh(1, 2, "cpu"))
    materialize(model, seed=3)
    want = torch.load(folder / "made.pt")
    for name, parameter in model.named_parameters():
        assert torch.equal(_whole(parameter.detach()), want[name]), name
    model(torch.randn(1, 3, 16, 16)).sum().backward()


def _two_ranks(folder):
    spread, optimizer = _save_spread(folder)
    _resume_all(folder, [(1, 2), (2, 1)])
    _damage(folder / "damaged", spread, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="checkpoint .* is half-written")
        _full_disk(folder / "full", spread, optimizer)
    _made_in_parts(folder)


def _four_ranks(folder):
    _save_spread(folder)
    _resume_all(folder, [(2, 2), (4, 1)])


def test_checkpoints_load_on_any_number_of_ranks(tmp_path):
    with torch.device("meta"):
        made = vmoe_torch.VMoE(**OPTIONS, **MOE)
    made = materialize(made, seed=3)
    torch.save(dict(made.named_parameters()), tmp_path / "made.pt")
    # The model's own initialisation: its bounds, and the same draw for every expert.
    weight = made.blocks[1].mlp.fc1.weight
    assert torch.equal(weight[0], weight[3])
    assert 0.9 < weight.abs().max() / (6 / (weight.shape[1] + weight.shape[2])) ** 0.5 <= 1
    assert not torch.equal(made.blocks[0].attn.proj.weight, made.blocks[1].attn.proj.weight)

    run(2, tmp_path, _two_ranks, tmp_path)
    _resume(tmp_path, 1, 1)
    exported = timm.create_model(
        "vmoe_s32", **OPTIONS, **MOE, checkpoint_path=str(tmp_path / "model.safetensors")
    ).state_dict()
    _, ended = torch.load(tmp_path / "expected.pt")
    for name in (name for name in ended if name in exported):
        torch.testing.assert_close(exported[name], ended[name].float(), msg=name)


def test_made_weights_leave_the_generators_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
    with torch.device("meta"):
        model = vmoe_torch.VMoE(**OPTIONS, **MOE)
    before = torch.get_rng_state()
    materialize(model, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoint_of_four_ranks_loads_on_fewer(tmp_path):
    run(4, tmp_path, _four_ranks, tmp_path)
    run(2, tmp_path, _resume_all, tmp_path, [(1, 2), (2, 1)])
    _resume(tmp_path, 1, 1)


def test_checkpoints_of_one_process(tmp_path):
    model = _model()
    optimizer = _optimizer(model)
    checkpoints = ShardedCheckpoints(tmp_path, keep=1)
    assert checkpoints.load(model, optimizer) is None
    for update in (1, 2):
        _steps(model, optimizer, update, 1)
        checkpoints.save(update, model, optimizer, {"update": update})
    want = _snapshot(model, optimizer)
    _steps(model, optimizer, 3, 1)
    assert checkpoints.load(model, optimizer) == {"update": 2}
    for name, tensor in _snapshot(model, optimizer).items():
        assert torch.equal(tensor, want[name]), name
    (tmp_path / "update_00000002" / "state.pt").unlink()
    with pytest.warns(UserWarning, match=r"update_00000002 is damaged, skipped: state.pt is missing"):
        assert checkpoints.load(model, optimizer) is None
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        ShardedCheckpoints(tmp_path, keep=0)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    model = _model()
    checkpoints = ShardedCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, model, _optimizer(model), {})
    other = vmoe_torch.VMoE(**{**OPTIONS, "num_classes": 6}, **MOE)
    with pytest.raises(ValueError, match=r"must hold head.weight of shape \(6, 32\), got \(5, 32\)"):
        checkpoints.load(other)
    smaller = vmoe_torch.VMoE(**{**OPTIONS, "depth": 1}, **MOE)
    with pytest.raises(ValueError, match=r"must hold the model's weights only, got blocks\.1\..* and others"):
        checkpoints.load(smaller)
    (tmp_path / "update_00000001" / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"checkpoint .*update_00000001 cannot be read"):
        load_checkpoint(tmp_path / "update_00000001", model)


def test_damaged_checkpoint_pushes_no_later_one_out(tmp_path):
    model = _model()
    optimizer = _optimizer(model)
    checkpoints = ShardedCheckpoints(tmp_path, keep=1)
    checkpoints.save(10, model, optimizer, {"update": 10})
    (tmp_path / "update_00000010" / "state.pt").write_bytes(b"half of it")
    with pytest.warns(UserWarning, match="update_00000010 is damaged, skipped"):
        assert checkpoints.load(model, optimizer) is None
    checkpoints.save(2, model, optimizer, {"update": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["update_00000002"]
    # Nor does a later one that somebody else has put there.
    checkpoints.save(20, model, optimizer, {"update": 20})
    checkpoints.save(4, model, optimizer, {"update": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update_00000004", "update_00000020"]


def test_checkpoint_holds_the_options_of_the_optimiser(tmp_path):
    model = _model()

    def optimizer(lr):
        decayed = [{"params": [model.head.weight]}, {"params": [model.cls_token, model.pos_embed], "weight_decay": 0.0}]
        return torch.optim.AdamW(decayed, lr=lr, weight_decay=0.05)

    saved = optimizer(1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(saved, 0.5)
    saved.step()
    schedule.step()
    checkpoints = ShardedCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, model, saved, {})
    loaded = optimizer(7.0)
    checkpoints.load(model, loaded)
    assert [group["lr"] for group in loaded.param_groups] == [5e-4, 5e-4]
    assert [group["weight_decay"] for group in loaded.param_groups] == [0.05, 0.0]
    assert loaded.param_groups[1]["initial_lr"] == 1e-3
