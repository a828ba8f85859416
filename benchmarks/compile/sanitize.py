"""A small MoE layer, forward and backward, for compute-sanitizer to watch: odd sizes, a smaller last group, drops.

Every op is called, and every layer a second time with the tiles that large layers have on the card.

compute-sanitizer --tool memcheck python -m benchmarks.compile.sanitize
"""

import sys
from contextlib import ExitStack

import torch

import vmoe_kernels as kernels
from benchmarks.harness.protocol import with_gradients
from vmoe_kernels.common import launch
from vmoe_kernels.experts.triton_gemm import LINEAR_OPS

# T, S, D, H, E, K: sizes that are no multiple of a block, one expert more than tokens select, whole blocks.
SHAPES = ((13, 5, 48, 40, 5, 3), (197, 197, 64, 136, 8, 2), (1, 1, 16, 16, 1, 1), (150, 150, 256, 512, 3, 2))


def layer(tokens: int, group: int, width: int, hidden: int, experts: int, selected: int, device: torch.device) -> None:
    """One training step through every op, in every order of priority."""
    generator = torch.Generator(device).manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seed = torch.tensor(7, device=device)
    for batch_priority in (False, True):
        inputs = {"x": leaf(tokens, width), "router": leaf(experts, width)}
        weights = {
            "fc1_weight": leaf(experts, hidden, width),
            "fc1_bias": leaf(experts, hidden),
            "fc2_weight": leaf(experts, width, hidden),
            "fc2_bias": leaf(experts, width),
        }

        def step(x, router, batch_priority=batch_priority, **weights) -> torch.Tensor:
            groups, noise = {"group_size": group}, {"noise_std": 1.0, "seed": seed}
            scored = kernels.router(x, router, num_selected_experts=selected, **groups, **noise)
            chosen, gates = scored.experts, scored.gates
            places = {**groups, "capacity": 2, "last_capacity": 1, "batch_priority": batch_priority}
            slots = kernels.assign_slots(chosen, gates, num_experts=experts, **places)
            with_rows = kernels.assign_rows(chosen, gates, num_experts=experts, **places)
            rows = kernels.rows_per_expert(tokens, group, 2, 1)
            settings = {"drop": 0.1, "seed": seed}
            fused = kernels.moe_mlp(
                x, with_rows.slots, gates, **weights, rows_per_expert=rows, choices=with_rows.choices, **settings
            )
            buffer = kernels.dispatch(x, slots, experts * rows).view(experts, rows, width)
            out = kernels.expert_mlp(buffer, **weights, **settings).flatten(0, 1)
            dropless = kernels.assign_dropless_slots(chosen, num_experts=experts, **groups)
            everything = kernels.dropless_mlp(x, *dropless, gates, **weights)
            return fused + kernels.combine(out, slots, gates) + everything + scored.importance.sum()

        leaves = {**inputs, **weights}
        with_gradients(lambda step=step, leaves=leaves: step(**leaves), leaves, torch.ones_like(inputs["x"]))


def main(device: torch.device) -> int:
    for shape in SHAPES:
        layer(*shape, device)
        with ExitStack() as stack:
            for op in LINEAR_OPS:
                stack.enter_context(launch.override(op, launch.look_up(op, device, "wide")))
            layer(*shape, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"{len(SHAPES)} layers ran")
    return 0


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("python -m benchmarks.compile.sanitize needs a CUDA device")
    sys.exit(main(torch.device("cuda", torch.cuda.current_device())))
