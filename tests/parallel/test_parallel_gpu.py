"""On one GPU, NCCL with one rank runs the path of many: exchange, FSDP2, recomputation, compile, checkpoints."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import vmoe_torch
from vmoe_torch.parallel import ShardedCheckpoints, build_mesh, clip_grad_norm, parallelize, parameter_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # The compiler's: what it says of float32 products, and its looks at the parameters that FSDP has gathered and, in
    # torch 2.11, at autograd functions.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _model():
    torch.manual_seed(0)
    model = vmoe_torch.VMoE(
        img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=5, num_experts=4, noise_std=0.0
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.cuda()


@pytest.mark.parametrize("options", [{}, {"chunks": 2, "recompute": True}, {"compile": True}], ids=str)
def test_one_nccl_rank_trains_as_no_group(one_rank, tmp_path, options):
    single = _model()
    spread = parallelize(copy.deepcopy(single), build_mesh(1, 1, "cuda"), **options)
    make = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(8, 3, 32, 32, generator=make, device="cuda")
    y = torch.randint(5, (8,), generator=make, device="cuda")
    results = []
    for model in (single, spread):
        optimizer = torch.optim.AdamW(parameter_groups([{"params": list(model.parameters())}]), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            norm = clip_grad_norm(model.parameters(), 0.5)
            optimizer.step()
        results.append((logits.detach(), norm))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=2e-3, atol=2e-3)
    checkpoints = ShardedCheckpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(3, spread, optimizer, {"step": 3})
    saved = spread.head.weight.full_tensor().clone()
    checkpoints.wait()
    with torch.no_grad():
        spread.head.weight.zero_()
    assert checkpoints.load(spread, optimizer) == {"step": 3}
    assert torch.equal(spread.head.weight.full_tensor(), saved)
