"""Tokens to the rows of the experts and back: each to slots of its own, or all in one mixture for every slot.

Dims: T tokens, D and O widths, E experts, R rows per expert, G groups of S tokens, P slots per expert and group, K
choices of a token, of a mixture E * P.
"""

from torch import Tensor

from vmoe_torch.layers import steps


def fill(x: Tensor, slots: Tensor, mix: Tensor | None, num_experts: int, rows: int, impl: str) -> Tensor:
    """The rows that the experts work on.

    Args:
        x: (T, D).
        slots: (T, K) of `Routed`.
        mix: (G, S, E * P) of `Routed`, or None for one token per slot.
        num_experts: E.
        rows: R.
        impl: as in `steps`.

    Returns:
        (E, R, D) in x.dtype.
    """
    if mix is None:
        return steps.dispatch(x, slots, num_experts * rows, impl).view(num_experts, rows, x.shape[1])
    mixed = mix.to(x.dtype).transpose(1, 2) @ x.view(-1, mix.shape[1], x.shape[1])
    return mixed.unflatten(1, [num_experts, mix.shape[2] // num_experts]).transpose(0, 1).flatten(1, 2)


def collect(rows: Tensor, slots: Tensor, mix: Tensor | None, gates: Tensor, impl: str) -> Tensor:
    """What every token gets back of the experts' rows.

    Args:
        rows: (E, R, O).
        slots: (T, K) of `Routed`.
        mix: (G, S, E * P) of `Routed`, or None.
        gates: (T, K) weights of the sum.
        impl: as in `steps`.

    Returns:
        (T, O) in rows.dtype.
    """
    if mix is None:
        return steps.combine(rows.flatten(0, 1), slots, gates, impl)
    slots_per_expert = mix.shape[2] // rows.shape[0]
    by_group = rows.unflatten(1, [mix.shape[0], slots_per_expert]).transpose(0, 1).flatten(1, 2)
    return (gates.view(mix.shape).to(rows.dtype) @ by_group).flatten(0, 1)
