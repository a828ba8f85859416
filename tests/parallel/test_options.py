"""Options of `parallelize` two by two: each pair trains as the plain model does."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.utils import counters

import vmoe_torch
from tests.parallel.processes import run
from vmoe_torch.parallel import build_mesh, parallelize

# The compiler's looks at the parameters that FSDP has gathered and, in torch 2.11, at autograd functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]
IMAGES = 4
# recompute, compile, accumulation, dtype of autocast, dp and ep: every value with every value of every other.
VALUES = ((False, True), (False, True), (1, 2), (torch.float32, torch.bfloat16), ((1, 2), (2, 1)))


def all_pairs(values):
    """Few cases that hold all pairs of values of different options."""
    missing = {
        (i, a, j, b)
        for (i, left), (j, right) in itertools.combinations(enumerate(values), 2)
        for a in left
        for b in right
    }
    cases = []
    while missing:
        case = max(itertools.product(*values), key=lambda case: sum(_holds(case, pair) for pair in missing))
        missing = {pair for pair in missing if not _holds(case, pair)}
        cases.append(case)
    return cases


def _holds(case, pair):
    i, a, j, b = pair
    return case[i] == a and case[j] == b


def _model():
    torch.manual_seed(0)
    model = vmoe_torch.VMoE(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        num_experts=4,
        group_size=1,
        noise_std=0.0,
    )
    torch.nn.init.normal_(model.head.weight, std=0.1)
    for layer in vmoe_torch.moe_layers(model).values():
        torch.nn.init.normal_(layer.router.weight, std=0.5)
    return model


def _gradients(model, x, y, accumulation, dtype):
    model.zero_grad()
    for part in range(accumulation):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(x[part::accumulation])
        (F.cross_entropy(logits.float(), y[part::accumulation]) / accumulation).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).float() for name, g in found.items()}


def _compare(recompute, compile, accumulation, dtype, sizes):
    rank = dist.get_rank()
    single = _model()
    # Injected auxiliary gradients know nothing of accumulation in a loop of one's own.
    for layer in vmoe_torch.moe_layers(single).values():
        layer.importance_loss_weight = layer.load_loss_weight = 0.0
    spread = parallelize(copy.deepcopy(single), build_mesh(*sizes, "cpu"), recompute=recompute, compile=compile)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * IMAGES, 3, 16, 16, generator=generator)
    y = torch.randint(5, (2 * IMAGES,), generator=generator)
    mine = slice(rank * IMAGES, (rank + 1) * IMAGES)
    want = _gradients(single, x, y, 1, dtype)
    torch._dynamo.reset()
    counters.clear()
    got = _gradients(spread, x[mine], y[mine], accumulation, dtype)
    assert (counters["stats"]["unique_graphs"] > 0) == compile
    budget = 1e-4 if dtype == torch.float32 else 0.1
    for name, gradient in want.items():
        if not name.endswith("qkv.bias"):
            error = (got[name] - gradient).norm() / gradient.norm()
            assert error <= budget, f"{name}: {error:.2e} with {(recompute, compile, accumulation, dtype, sizes)}"


def _compare_all():
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor", category=UserWarning)
    warnings.filterwarnings("ignore", message=".* should not be instantiated", category=DeprecationWarning)
    for case in all_pairs(VALUES):
        _compare(*case)


def test_pairs_of_options_train_as_the_plain_model(tmp_path):
    run(2, tmp_path, _compare_all)


def test_all_pairs_are_in_the_cases():
    cases = all_pairs(VALUES)
    assert len(cases) <= 8
    for i, j in itertools.combinations(range(len(VALUES)), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(VALUES[i], VALUES[j]))


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_moe_block_is_compiled(recompute, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        torch._dynamo.reset()
        counters.clear()
        model = parallelize(_model(), build_mesh(1, 1, "cpu"), recompute=recompute, compile=True)
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        # One in the dense block; attention, and one of both norms, in the block with the MoE layer.
        assert counters["stats"]["unique_graphs"] >= 3
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()
