"""Dispatch, experts and combine for TorchScript, which compiles functions of tensors and numbers, not of callables."""

import torch
from torch import Tensor


def run_experts(
    tokens: Tensor,
    slots: Tensor,
    gates: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    rows: int,
    activation: str,
    dispatch_dtype: torch.dtype | None,
) -> Tensor:
    """What `MoeMlp` does with routed tokens in eval mode, on the registered ops.

    Args:
        tokens: (T, D).
        slots: (T, K) int32.
        gates: (T, K).
        fc1_weight: (E, H, D).
        fc1_bias: (E, H) or None.
        fc2_weight: (E, O, H).
        fc2_bias: (E, O) or None.
        rows: R, per expert.
        activation: the kernels' name.
        dispatch_dtype: what goes into the experts and what comes out is rounded to it.

    Returns:
        (T, O).
    """
    if dispatch_dtype is not None:
        experts = fc1_weight.shape[0]
        buffer = torch.ops.vmoe.dispatch(tokens.to(dispatch_dtype), slots, experts * rows)
        buffer = buffer.to(tokens.dtype).view(experts, rows, tokens.shape[1])
        out = torch.ops.vmoe.expert_mlp(
            buffer, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, 0.0, None, False
        )[0]
        return torch.ops.vmoe.combine(out.to(dispatch_dtype).to(tokens.dtype).flatten(0, 1), slots, gates)
    return torch.ops.vmoe.moe_mlp(
        tokens, slots, gates, fc1_weight, fc1_bias, fc2_weight, fc2_bias, rows, activation, 0.0, None, False
    )[0]
