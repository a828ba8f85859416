"""A whole training step of a V-MoE on a GPU: captured in a CUDA graph, and without a wait for the device."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_kernels.testing import forbidden_synchronisation

vmoe_torch = pytest.importorskip("vmoe_torch", reason="models need timm")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IMAGES, CLASSES = 16, 5


def _trainer(**options) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of a small model, the same for equal options: forward, backward, clipping, AdamW; returns the loss."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    model = vmoe_torch.VMoE(**shape, num_experts=4, **options).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        # A cache of casts would outlive the capture.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    make = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(IMAGES, 3, 32, 32, generator=make).cuda(),
            torch.randint(CLASSES, (IMAGES,), generator=make).cuda(),
        )
        for _ in range(count)
    ]


def test_training_step_replays_in_a_cuda_graph():
    # Without noise, whose seeds a graph draws elsewhere in the stream of random numbers.
    captured, eager = _trainer(noise_std=0.0), _trainer(noise_std=0.0)
    first, *batches = _batches(5)
    x, labels = (tensor.clone() for tensor in first)
    # Compiling and the allocator's first calls must not be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured(x, labels)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager(*first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured(x, labels)
    losses = []
    for batch in batches:
        for static, tensor in zip((x, labels), batch):
            static.copy_(tensor)
        graph.replay()
        losses.append((loss.item(), eager(*batch).item()))
    got, want = torch.tensor(losses).t()
    # Attention's backward adds in any order.
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    assert len(set(want.tolist())) == len(batches)


@pytest.mark.parametrize("options", [{}, {"router": "expert_choice"}], ids=str)
def test_training_step_never_synchronises(options):
    step = _trainer(noise_std=1.0, **options)
    (x, labels), other = _batches(2)
    step(x, labels)
    with forbidden_synchronisation():
        step(*other)
