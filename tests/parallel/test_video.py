"""Video models on two processes: their experts compute what one process computes, and hold what is planned."""

import copy

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F

import vmoe_torch
from tests.parallel.processes import run
from tests.test_planning import held_after
from vmoe_torch.parallel import PlannedRun, build_mesh, parallelize, plan

CLIPS = 6  # of all ranks together
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def _model(**kwargs):
    torch.manual_seed(0)
    options = {**SIZES, "num_experts": 4, "noise_std": 0.0, "capacity_factor": 0.7, **kwargs}
    model = timm.create_model("test_vmoe_video", **options)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    for layer in vmoe_torch.moe_layers(model).values():
        # Experts start alike and routers weak: spread them, so that a wrong expert or a wrong drop shows.
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def _clips(frames):
    return torch.randn(CLIPS, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1)).double()


def _trains_as_one_process(frames, options, parallel):
    single = _model(**options).double()
    spread = parallelize(copy.deepcopy(single), build_mesh(1, 2, "cpu"), **parallel)
    clips, labels = _clips(frames), torch.arange(CLIPS) % 5
    rank = dist.get_rank()
    mine = slice(rank * CLIPS // 2, (rank + 1) * CLIPS // 2)
    want = single(clips)
    F.cross_entropy(want, labels).backward()
    got = spread(clips[mine])
    F.cross_entropy(got, labels[mine]).backward()
    torch.testing.assert_close(got, want[mine], rtol=1e-9, atol=1e-9)
    # A clip is a group of its own: its slots are those of its patches, of all frames.
    assert {layer.group_size for layer in vmoe_torch.moe_layers(spread).values()} == {1}
    for name, parameter in spread.named_parameters():
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        expected = single.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    assert single.patch_embed.proj.weight.grad.abs().sum() > 0


def _holds_what_is_planned():
    model = _model(num_frames=8, capacity_factor=1.05)
    settings = PlannedRun(2, 2, CLIPS, compute_bytes=4, wire_bytes=2)
    want = plan(model, settings)
    options = {"wire_dtype": torch.bfloat16, "reshard_after_forward": False}
    parallelize(model, build_mesh(1, 2, "cpu"), **options)
    clips = torch.randn(CLIPS // 2, 3, 8, 16, 16)
    held, (forward, calls), _ = held_after(model, clips, torch.zeros(CLIPS // 2, dtype=torch.long), autocast=False)
    # 4 times of 16 patches and a class token: 65 tokens * 2 * 1.05 / 4 experts is 35 slots, or 36, which 4 divides.
    by_hand = 2 * 4 * (CLIPS // 2) * 36 * 32 * (2 - 1) // 2 * 2
    assert want.exchange_per_layer == by_hand
    assert (forward, calls) == (2 * by_hand, 4)
    assert abs(held / want.activations - 1) <= 0.02, f"activations: held {held}, planned {want.activations}"


def _all():
    _trains_as_one_process(4, {}, {})
    _trains_as_one_process(6, {"pos_embed": "factorised", "batch_priority": True}, {"chunks": 2, "recompute": True})
    _trains_as_one_process(4, {"router": "soft", "slots_per_expert": 3, "capacity_factor": 1.05}, {})
    _holds_what_is_planned()


def test_video_models_on_two_processes(tmp_path):
    run(2, tmp_path, _all)
