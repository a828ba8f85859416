"""The fewest bytes and FLOPs of each op, and the time that a chip's ceilings allow for them.

Inputs count as read once and outputs as written once.
Dims: T tokens, K choices, D width, H hidden width, E experts, N rows of the expert buffer.
"""

from dataclasses import dataclass

from benchmarks.harness.cases import Case
from vmoe_kernels.common.flops import linear_flops

# An H200's, for predictions: bf16 products at 8192^3 and a device-to-device copy, reads and writes counted.
H200_MATMUL, H200_COPY = 790e12, 4.3e12
INDEX_BYTES = 4  # int32, float32


@dataclass(frozen=True)
class Work:
    """What an op must do at least."""

    bytes: int
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, matmul: float = H200_MATMUL, copy: float = H200_COPY) -> float:
        """The larger of both times: products and copies overlap."""
        return max(self.bytes / copy, self.flops / matmul)


def router(case: Case, element: int = 2) -> dict[str, Work]:
    """x and the router weight in; logits, gates and experts out; the backward reads them and writes d_x."""
    tokens, experts = case.num_tokens * case.width * element, case.num_experts * case.width * element
    logits, chosen = case.num_tokens * case.num_experts * 4, case.num_tokens * case.num_selected * INDEX_BYTES
    flops = linear_flops(case.num_tokens, (case.num_experts, case.width))
    return {
        "forward": Work(tokens + experts + logits + 2 * chosen, flops),
        "backward": Work(2 * tokens + 2 * experts + logits + 2 * chosen, 2 * flops),
    }


def slots(case: Case) -> dict[str, Work]:
    """Experts and one priority per token in, slots out."""
    chosen = case.num_tokens * case.num_selected * INDEX_BYTES
    return {"forward": Work(2 * chosen + case.num_tokens * 4)}


def dispatch_bytes(num_tokens: int, num_choices: int, num_rows: int, width: int, itemsize: int) -> int:
    """Of a dispatch without drops: x once, the buffer once, the slots, and the map filled, written and read."""
    return (num_tokens + num_rows) * width * itemsize + num_tokens * num_choices * INDEX_BYTES + map_bytes(num_rows)


def dispatch_backward_bytes(num_tokens: int, num_choices: int, width: int, itemsize: int) -> int:
    """Of dispatch's backward without drops: the held rows once, d_x once, the slots."""
    return num_tokens * ((num_choices + 1) * width * itemsize + num_choices * INDEX_BYTES)


def combine_bytes(num_tokens: int, num_choices: int, width: int, itemsize: int) -> int:
    """Of a combine without drops: the held rows once, y once, slots and gates."""
    return num_tokens * ((num_choices + 1) * width * itemsize + 2 * num_choices * INDEX_BYTES)


def combine_backward_bytes(num_tokens: int, num_choices: int, num_rows: int, width: int, itemsize: int) -> int:
    """Of combine's backward without drops: d_y, the held rows, d_buffer, slots, map, gates and d_gates once."""
    rows = (num_tokens * (num_choices + 1) + num_rows) * width * itemsize
    return rows + 3 * num_tokens * num_choices * INDEX_BYTES + map_bytes(num_rows)


def map_bytes(num_rows: int) -> int:
    """Of the map from rows to the choices that hold them: filled, written, read."""
    return 3 * num_rows * INDEX_BYTES


def dispatch(case: Case, element: int = 2) -> dict[str, Work]:
    """Tokens and slots in, the buffer out; the backward the other way round."""
    tokens, chosen = case.num_tokens, case.num_selected
    return {
        "forward": Work(dispatch_bytes(tokens, chosen, case.num_rows, case.width, element)),
        "backward": Work(dispatch_backward_bytes(tokens, chosen, case.width, element)),
    }


def combine(case: Case, element: int = 2) -> dict[str, Work]:
    """Buffer, slots and gates in, tokens out; the backward reads d_y and the buffer, writes d_buffer and d_gates."""
    tokens, chosen = case.num_tokens, case.num_selected
    return {
        "forward": Work(combine_bytes(tokens, chosen, case.width, element)),
        "backward": Work(combine_backward_bytes(tokens, chosen, case.num_rows, case.width, element)),
    }


def expert_mlp(case: Case, element: int = 2) -> dict[str, Work]:
    """Buffer and weights in, buffer out; training also writes the pre-activation and reads it again."""
    buffer = case.num_rows * case.width * element
    weights = 2 * case.num_experts * case.width * case.hidden * element
    hidden = case.num_rows * case.hidden * element
    forward = Work(2 * buffer + weights + 2 * hidden, case.mlp_flops)
    # The backward makes d_hidden and the hidden activations again, and reads both twice.
    backward = Work(3 * buffer + 2 * weights + hidden + 4 * hidden, 2 * case.mlp_flops)
    return {"forward": forward, "both": forward + Work(hidden) + backward}


def moe_layer(case: Case, element: int = 2) -> dict[str, Work]:
    """Routing, and an expert MLP that gathers its tokens and whose outputs are combined."""
    route, mlp = router(case, element), expert_mlp(case, element)
    ends = {"forward": combine(case, element)["forward"]}
    ends["both"] = ends["forward"] + combine(case, element)["backward"]
    place = slots(case)["forward"]
    return {
        "forward": route["forward"] + place + mlp["forward"] + ends["forward"],
        "both": route["forward"] + route["backward"] + place + mlp["both"] + ends["both"],
    }


OPS = {
    "router": router,
    "slots": slots,
    "dispatch": dispatch,
    "combine": combine,
    "expert_mlp": expert_mlp,
    "moe_layer": moe_layer,
}


def moe_mlp_costs(
    num_tokens: int, num_choices: int, num_rows: int, num_experts: int, width: int, hidden: int, itemsize: int
) -> dict[str, tuple[int, int]]:
    """What each kernel of a layer's experts must do at least, at full capacity.

    Args:
        num_tokens: T.
        num_choices: K.
        num_rows: N, rows of all experts.
        num_experts: E.
        width: D, in and out.
        hidden: H.
        itemsize: bytes of an element of the data and weights.

    Returns:
        Kernel to (FLOPs, bytes), each operand and result counted once, forward kernels first.
    """
    gemm = linear_flops(num_rows, (hidden, width))
    tokens, rows, acts = num_tokens * width, num_rows * width, num_rows * hidden
    weight = num_experts * width * hidden
    return {
        "expert_up": (gemm, (tokens + weight + 2 * acts) * itemsize),
        "expert_down": (gemm, (acts + weight + rows) * itemsize),
        "combine": (0, combine_bytes(num_tokens, num_choices, width, itemsize)),
        "expert_d_hidden": (gemm, (tokens + weight + 3 * acts) * itemsize),
        "output_bias": (0, tokens * itemsize),
        "expert_d_fc2": (gemm, (tokens + acts + weight) * itemsize),
        "expert_d_fc1": (gemm, (tokens + acts + weight) * itemsize),
        "expert_d_rows": (gemm, (acts + weight + rows) * itemsize),
        "dispatch_backward": (0, dispatch_backward_bytes(num_tokens, num_choices, width, itemsize)),
    }
