"""Experts of several sizes (`expert_hidden`): one tensor per size, so nothing is padded, and one product per size.

The experts' two layers are `ExpertLinear`s where all are of one size, and `SizedLinear`s of such where they are not.
`moe_mlp` and `expert_mlp` run either, as a list of the weights of each size; null experts have none and give 0.

Dims: E experts, n of one size, T tokens, K choices, R rows per expert, D width in, H hidden width, O width out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vmoe_kernels.common.flops import mlp_flops
from vmoe_torch.layers import steps
from vmoe_torch.layers.experts import ExpertLinear, Weights, parameters
from vmoe_torch.layers.recording import is_recorded
from vmoe_torch.layers.sizes import ExpertSizes


class SizedLinear(nn.Module):
    """One linear layer per expert, of several sizes: an `ExpertLinear` for each, named by its experts.

    Args:
        linears: {`SizeGroup.name`: the layer of these experts}, from wide to narrow, without null experts.
    """

    def __init__(self, linears: dict[str, ExpertLinear]):
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)

    def linears(self) -> list[ExpertLinear]:
        """The layers of each size."""
        return list(self.children())

    @torch.jit.ignore
    def forward(self, x: Tensor | list[Tensor], use: Callable | None = None):
        """The linear layers of every size, or another use of their parameters, as `ExpertLinear`.

        Args:
            x: (R, in), rows for all experts, or for each size what its layer takes. With `use`, what that takes.
            use: called with x and the weights and biases of every size in turn, inside the calls of their layers.

        Returns:
            A list with what each layer gives, or what `use` returns.
        """
        linears = self.linears()
        if use is None:
            parts = x if isinstance(x, list) else [x] * len(linears)
            return [linear(part) for linear, part in zip(linears, parts, strict=True)]
        if torch.compiler.is_exporting() or is_recorded():
            # A graph holds the parameters anyway, and its modules must not call their siblings.
            return use(x, *(each for linear in linears for each in linear(x, parameters)))
        return _nested(linears, use, (), x)

    def __prepare_scriptable__(self):
        raise RuntimeError("a scripted MoeMlp must have experts of one size, got several by expert_hidden")


def _nested(linears: list[ExpertLinear], use: Callable, found: tuple[Tensor | None, ...], x: Tensor):
    """Calls each layer inside the call of the one before."""
    if not linears:
        return use(x, *found)
    return linears[0](x, lambda x, *own: _nested(linears[1:], use, (*found, *own), x))


def expert_linears(
    sizes: ExpertSizes, in_features: int, out_features: int, bias: bool, **dd
) -> list[ExpertLinear | SizedLinear]:
    """Both layers of the experts.

    Args:
        sizes: of the experts.
        in_features: D.
        out_features: O.
        bias: whether there are biases.
        **dd: device and dtype of the parameters.
    """
    made: list[dict[str, ExpertLinear]] = [{}, {}]
    for layer in (0, 1):
        for group in sizes.groups:
            if group.hidden > 0:
                ends = (in_features, group.hidden) if layer == 0 else (group.hidden, out_features)
                made[layer][group.name] = ExpertLinear(len(group.experts), *ends, bias, **dd)
    if len(sizes.groups) == 1:
        return [linear for linears in made for linear in linears.values()]
    return [SizedLinear(linears) for linears in made]


def flops(sizes: ExpertSizes, fc1: ExpertLinear | SizedLinear, fc2: ExpertLinear | SizedLinear, rows: list[int]) -> int:
    """Of so many rows of each expert, 2 * (D + O) * sum(H_e * rows_e)."""
    shapes = [(first.weight.shape, second.weight.shape) for first, second in zip(fc1.linears(), fc2.linears())]
    return sum(mlp_flops(sum(rows[e] for e in group.experts), *shape) for group, shape in zip(sizes.groups, shapes))


def by_size(weights: tuple[Tensor | None, ...]) -> list[Weights]:
    """The weights of each size, of what the calls of both layers hand out one after the other."""
    half = len(weights) // 2
    return [(*weights[i : i + 2], *weights[half + i : half + i + 2]) for i in range(0, half, 2)]


def moe_mlp(
    x: Tensor,
    slots: Tensor,
    gates: Tensor,
    weights: list[Weights],
    counts: list[int],
    rows: int,
    activation: str,
    drop: float,
    seed: Tensor | None,
    impl: str,
    choices: Tensor | None = None,
) -> Tensor:
    """`vmoe_kernels.moe_mlp` over all sizes: a token's output is the sum over what it gets from each.

    Args:
        x: (T, D) tokens.
        slots: (T, K) rows of a buffer in which experts of one size follow each other.
        gates: (T, K).
        weights: of each size, null experts left out.
        counts: experts of each size; where null experts are, they are the last.
        rows: R.
        activation: as the op has it.
        drop: probability of dropping a hidden activation.
        seed: 0-dim int64 key.
        impl: "auto", "triton" or "reference".
        choices: (E * R,) of the rows, where known; of use to experts of one size.

    Returns:
        (T, O).
    """
    if len(counts) == 1:
        return steps.moe_mlp(x, slots, gates, weights[0], rows, activation, drop, seed, impl, choices)
    first = counts[0]
    own = torch.where(slots < first * rows, slots, -1)
    y = steps.moe_mlp(x, own, gates, weights[0], rows, activation, drop, seed, impl)
    for i in range(1, len(weights)):
        end = first + counts[i]
        inside = (slots >= first * rows) & (slots < end * rows)
        own = torch.where(inside, slots - first * rows, -1)
        # Keys of their own: the op adds an expert's place among those of its size.
        key = None if seed is None else seed + first
        y = y + steps.moe_mlp(x, own, gates, weights[i], rows, activation, drop, key, impl)
        first = end
    return y


def expert_mlp(
    x: Tensor,
    weights: list[Weights],
    counts: list[int],
    activation: str,
    drop: float,
    seed: Tensor | None,
    impl: str,
) -> Tensor:
    """`vmoe_kernels.expert_mlp` over all sizes, (E, R, D) to (E, R, O); arguments as of `moe_mlp`."""
    if len(counts) == 1:
        return steps.expert_mlp(x, weights[0], activation, drop, seed, impl)
    outs: list[Tensor] = []
    first = 0
    for i in range(len(weights)):
        key = None if seed is None else seed + first
        outs.append(steps.expert_mlp(x[first : first + counts[i]], weights[i], activation, drop, key, impl))
        first += counts[i]
    if len(counts) > len(weights):
        like = outs[0]
        outs.append(like.new_zeros((counts[-1], like.shape[1], like.shape[2])))
    return torch.cat(outs)
