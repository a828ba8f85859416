"""What an op must do at least: bytes counted from tensors, and FLOPs that every counter of the project agrees on."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vmoe_torch
from benchmarks.harness import work
from benchmarks.harness.cases import Case
from benchmarks.harness.work import combine_backward_bytes, combine_bytes, dispatch_backward_bytes, dispatch_bytes
from vmoe_torch.evaluate import count_flops
from vmoe_torch.planning import forward_flops


def test_bytes_count_every_tensor_once():
    num_tokens, num_choices, width = 6, 2, 8
    num_rows = num_tokens * num_choices
    tokens, rows = torch.empty(num_tokens, width).nbytes, torch.empty(num_rows, width).nbytes
    choices = torch.empty(num_tokens, num_choices).nbytes
    assert dispatch_bytes(num_tokens, num_choices, num_rows, width, 4) == tokens + rows + 4 * choices
    assert dispatch_backward_bytes(num_tokens, num_choices, width, 4) == tokens + rows + choices
    assert combine_bytes(num_tokens, num_choices, width, 4) == tokens + rows + 2 * choices
    moved = combine_backward_bytes(num_tokens, num_choices, num_rows, width, 4)
    assert moved == tokens + 2 * rows + 6 * choices


def test_predictions_follow_the_rows_that_move():
    # 25,088 tokens in and 26,624 rows out, 1,536 bytes each, at 4.3 TB/s.
    dispatched, combined = work.dispatch(Case(num_selected=1)), work.combine(Case(num_selected=2))
    assert dispatched["forward"].seconds() * 1e6 == pytest.approx((25_088 + 26_624) * 1536 / 4.3e6, rel=0.01)
    assert combined["forward"].seconds() * 1e6 == pytest.approx(3 * 25_088 * 1536 / 4.3e6, rel=0.01)


def test_every_counter_of_flops_agrees():
    """The ops' formulas, `vmoe eval`, `vmoe plan`, the benchmarks; a smaller last group, a capacity that rounds."""
    images, side = 5, 16
    options = {"img_size": side, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = vmoe_torch.VMoE(**options, num_experts=4, group_size=2, capacity_factor=0.7, moe_layers=(1,))
    counted = count_flops(model, torch.zeros(images, 3, side, side))
    assert counted.total * images == forward_flops(model, images)
    layer = model.blocks[1].mlp
    x = torch.randn(4, layer.record.slots.shape[0] // images, 16, requires_grad=True)
    hidden, width = layer.fc1.weight.shape[1:]
    sizes = {"width": width, "hidden": hidden, "num_experts": 4, "num_selected": layer.num_selected_experts}
    case = Case(images=4, tokens_per_image=x.shape[1], group_images=2, capacity_factor=0.7, **sizes)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    assert forward.get_total_flops() == work.moe_layer(case)["forward"].flops
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert forward.get_total_flops() + backward.get_total_flops() == work.moe_layer(case)["both"].flops
