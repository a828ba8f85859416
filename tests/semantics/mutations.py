"""Faults to put into the kernels, one at a time, and the few tests that must notice each; mutate.py does it.

`before` stands once in the file (tests/kernels/test_mutations.py asks): a change of a kernel may have to move it.
"""

from typing import NamedTuple

_DISPATCH = ("tests/gpu/test_dispatch_gpu.py::test_dispatch_matches_eager[(13, 3, 5, 4, 48)-random-torch.bfloat16]",)
_COMBINE = (
    "tests/gpu/test_combine_gpu.py::test_combine_matches_eager[(13, 3, 5, 4, 48)-random-torch.bfloat16]",
    "tests/gpu/test_combine_gpu.py::test_combine_matches_eager[(9, 1, 5, 3, 1280)-random-torch.float32]",
)
_MOE = ("tests/gpu/test_moe_mlp_gpu.py::test_moe_mlp_matches_eager[(13, 3, 5, 4, 20)-random-torch.bfloat16]",)
_DROPS = ("tests/gpu/test_moe_mlp_gpu.py::test_moe_mlp_drops_as_its_twin[torch.bfloat16]",)
_EXPERTS = (
    "tests/gpu/test_expert_mlp_gpu.py::test_expert_mlp_matches_eager[(2, 300, 192, 160, 192)-relu-torch.bfloat16]",
)
_ODD = ("tests/gpu/test_expert_mlp_gpu.py::test_expert_mlp_matches_eager[(3, 13, 20, 70, 33)-relu-torch.bfloat16]",)
_TILES = ("tests/semantics/test_configs.py::test_gemms_as_the_chip_has_them[routed-(208, 336)]",)
_WHOLE_TILES = ("tests/semantics/test_configs.py::test_gemms_as_the_chip_has_them[routed-(256, 512)]",)
_DROPLESS = (
    "tests/gpu/test_dropless_gpu.py::test_slots_equal_eager[128-(128, 2, 2, 8)]",
    "tests/gpu/test_dropless_gpu.py::test_mlp_matches_eager[(13, 3, 5, 20)-False-torch.bfloat16]",
)
_ROUTER = (
    "tests/gpu/test_router_gpu.py::test_router_equals_reference[size1-1.0]",
    "tests/gpu/test_router_gpu.py::test_router_equals_reference[size2-0.0]",
)
_GROUPS = ("tests/gpu/test_router_gpu.py::test_router_equals_reference[size3-1.0]",)
_ROWS = "tests/gpu/test_slots_gpu.py::test_rows_hold_the_choices_whose_slots_they_are[size{}-{}-{}-{}]"
_SLOTS = "tests/gpu/test_slots_gpu.py::test_slots_keep_the_choices_of_the_twin[size{}-{}-{}-max-{}]"


class Mutation(NamedTuple):
    """A fault, and who must notice."""

    kind: str
    """What sort of fault: an index, a mask, a boundary, an order, a dtype, a missing zero, a sum, a race."""
    what: str
    """The fault, in words."""
    file: str
    """Of kernels/vmoe_kernels."""
    before: str
    """What stands in the file, once."""
    after: str
    """What is put in its place."""
    tests: tuple[str, ...]
    """Tests that run with it under ttsem, of which one must fail."""


_MOVE, _EPILOGUE = "rows/triton_move.py", "experts/triton_epilogue.py"
_GEMM, _GRADIENT = "experts/triton_gemm.py", "experts/triton_gradient.py"
_FORWARD, _BACKWARD = "routing/triton_router.py", "routing/triton_router_backward.py"
_SELECT, _SORT = "routing/triton_slots.py", "routing/triton_slots_sort.py"
_HALF = "ACTIVATION, WIDTH, BLOCK_ROWS, BLOCK // 2, PARTS // 2, TILE,\n        )  # fmt: skip\n        return\n"

MUTATIONS = (
    Mutation(
        "index",
        "dispatch takes a choice for its token",
        _MOVE,
        "tokens = (choices // K).to(tl.int64)",
        "tokens = choices.to(tl.int64)",
        _DISPATCH,
    ),
    Mutation(
        "boundary",
        "dispatch writes a row past the buffer",
        _MOVE,
        "inside = (rows < num_rows)[:, None]",
        "inside = (rows <= num_rows)[:, None]",
        _DISPATCH,
    ),
    Mutation(
        "mask",
        "dispatch reads a token for empty rows",
        _MOVE,
        "mask=(choices >= 0)[:, None] & (cols < D)[None, :],",
        "mask=(rows < num_rows)[:, None] & (cols < D)[None, :],",
        _DISPATCH,
    ),
    Mutation(
        "missing zero",
        "the map from rows to choices starts undefined",
        _MOVE,
        "choices = torch.full((num_rows,), -1, device=slots.device, dtype=torch.int32)",
        "choices = torch.empty((num_rows,), device=slots.device, dtype=torch.int32)",
        _DISPATCH,
    ),
    Mutation(
        "index",
        "combine weighs all of a token's choices by one gate",
        _MOVE,
        "tl.load(gates_ptr + choices, mask=tokens < num_tokens, other=0.0)",
        "tl.load(gates_ptr + tokens * K, mask=tokens < num_tokens, other=0.0)",
        _COMBINE,
    ),
    Mutation(
        "mask",
        "combine reads row -1 for dropped choices",
        _MOVE,
        "kept = (slots >= 0) & (slots < num_rows)\n        # Slots are unique",
        "kept = slots < num_rows\n        # Slots are unique",
        _COMBINE,
    ),
    Mutation(
        "missing zero",
        "gates of dropped choices get no gradient at all",
        _MOVE,
        "mask=(choices < num_choices) & ~kept)",
        "mask=(choices < num_choices) & kept)",
        _COMBINE,
    ),
    Mutation(
        "sum",
        "a gate's gradient is that of the last block of columns",
        "rows/triton_combine_backward.py",
        "d_gates += tl.sum(d_y * buffer, 1)",
        "d_gates = tl.sum(d_y * buffer, 1)",
        _COMBINE,
    ),
    Mutation(
        "boundary",
        "combine's backward takes empty rows for held ones",
        "rows/triton_combine_backward.py",
        "held = choices >= 0",
        "held = choices >= -1",
        _COMBINE,
    ),
    Mutation(
        "boundary",
        "a tile of experts' rows is one row longer",
        _EPILOGUE,
        "count = num_rows - first\n",
        "count = num_rows - first + 1\n",
        _ODD,
    ),
    Mutation(
        "sum",
        "the gate's gradient is taken with the pre-activation",
        _EPILOGUE,
        "tl.sum(d_hidden * hidden, 1)",
        "tl.sum(d_hidden * pre, 1)",
        _MOE,
    ),
    Mutation(
        "index",
        "the right half of a tile is stored over the left",
        _EPILOGUE,
        f"start + BLOCK // 2, {_HALF}",
        f"start, {_HALF}",
        _ODD,
    ),
    Mutation(
        "boundary",
        "a bias is read one element too far, where nothing is stored",
        _EPILOGUE,
        "tl.load(bias_ptr + owner * WIDTH + cols, mask=cols < WIDTH, other=0.0)",
        "tl.load(bias_ptr + owner * WIDTH + cols, mask=cols <= WIDTH, other=0.0)",
        _ODD,
    ),
    Mutation(
        "missing zero",
        "the hidden gradient of empty rows stays undefined",
        _EPILOGUE,
        "inside = tile_mask(rows < count, cols, WIDTH, TILE)",
        "inside = mask",
        _MOE,
    ),
    Mutation(
        "sum",
        "dropout is not in the slope",
        _EPILOGUE,
        "slope *= scale\n",
        "slope *= 1.0\n",
        _DROPS,
    ),
    Mutation(
        "order",
        "tiles of the last, smaller group of rows are counted as if it were whole",
        _GEMM,
        "return expert, first + tile % size, tile // size",
        "return expert, first + tile % GROUP_ROWS, tile // GROUP_ROWS",
        _EXPERTS,
    ),
    Mutation(
        "sum",
        "a product forgets the columns before its last block",
        _GEMM,
        "acc = tl.dot(x, w, acc, input_precision=PRECISION)",
        "acc = tl.dot(x, w, input_precision=PRECISION)",
        _EXPERTS,
    ),
    Mutation(
        "boundary",
        "a weight is read one element too far, where the other factor is 0",
        _GEMM,
        "mask=(inner < IN)[:, None] & (cols < OUT)[None, :], other=0.0)",
        "mask=(inner <= IN)[:, None] & (cols < OUT)[None, :], other=0.0)",
        _ODD,
    ),
    Mutation(
        "index",
        "experts read the token whose number is the choice's",
        _GEMM,
        "x_tile_ptr, sources = x_ptr, (choices // K).to(tl.int64)",
        "x_tile_ptr, sources = x_ptr, choices.to(tl.int64)",
        _MOE,
    ),
    Mutation(
        "boundary",
        "weight gradients leave out each expert's last row",
        _GRADIENT,
        "first, count = expert * num_rows, num_rows\n",
        "first, count = expert * num_rows, num_rows - 1\n",
        _ODD,
    ),
    Mutation(
        "index",
        "an expert's rows end where another's begin",
        _GRADIENT,
        "tl.load(spans_ptr + num_experts + expert)",
        "tl.load(spans_ptr + (expert + 1) % num_experts)",
        _DROPLESS,
    ),
    Mutation(
        "race",
        "all tiles of columns write one plane of the gates' partial sums",
        _GRADIENT,
        ".to(tl.int64) * num_parts * num_rows",
        ".to(tl.int64) * 0",
        _TILES,
    ),
    Mutation(
        "race",
        "all tiles of rows write one plane of the bias's partial sums",
        _GRADIENT,
        "sums_ptr = column_sums_ptr + (expert * row_tiles + tile_row) * OUT",
        "sums_ptr = column_sums_ptr + (expert * row_tiles) * OUT",
        _TILES,
    ),
    Mutation(
        "index",
        "the backward weighs a row by its token's first gate",
        _GRADIENT,
        "gates = tl.load(gates_ptr + choices, mask=held, other=0.0)",
        "gates = tl.load(gates_ptr + choices // K * K, mask=held, other=0.0)",
        _MOE,
    ),
    Mutation(
        "boundary",
        "the last group of tokens is as long as the others",
        _FORWARD,
        "end = tl.minimum((group + 1) * group_size, num_tokens)",
        "end = (group + 1) * group_size",
        _GROUPS,
    ),
    Mutation(
        "order",
        "the same expert is chosen K times",
        _FORWARD,
        "keys = tl.where(chosen, -1.0, keys)",
        "keys = tl.where(chosen, keys, keys)",
        _ROUTER,
    ),
    Mutation(
        "mask",
        "experts that are not there have a share of the softmax",
        _FORWARD,
        'logits = tl.where(columns, logits, float("-inf"))',
        "logits = tl.where(columns, logits, logits)",
        _ROUTER,
    ),
    Mutation(
        "dtype",
        "the router's logits are rounded to tf32",
        _FORWARD,
        "acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, acc)",
        'acc = tl.fma(tl.dot(a, b, input_precision="tf32"), 1.0, acc)',
        _ROUTER,
    ),
    Mutation(
        "index",
        "tokens next to each other share their noise",
        _FORWARD,
        "(rows[:, None] * tl.cdiv(E, 4) + blocks[None, :]).to(tl.uint32)",
        "(rows[:, None] + blocks[None, :]).to(tl.uint32)",
        _ROUTER,
    ),
    Mutation(
        "index",
        "two experts have each other's noise",
        _FORWARD,
        "tl.join(tl.join(noise_1, noise_3), tl.join(noise_2, noise_4))",
        "tl.join(tl.join(noise_1, noise_2), tl.join(noise_3, noise_4))",
        _ROUTER,
    ),
    Mutation(
        "index",
        "mean gates are read from another plane of partial sums",
        _FORWARD,
        "noisy += tl.load(pointers + 2 * plane",
        "noisy += tl.load(pointers + 1 * plane",
        _GROUPS,
    ),
    Mutation(
        "sum",
        "only the last choice's gate has a gradient",
        _BACKWARD,
        "d_probs += tl.where(experts[None, :] == chosen[:, None]",
        "d_probs = tl.where(experts[None, :] == chosen[:, None]",
        _ROUTER,
    ),
    Mutation(
        "boundary",
        "the last run of tokens reads past the last token",
        _BACKWARD,
        "end = tl.minimum(first + tokens_per_split, num_tokens)",
        "end = first + tokens_per_split",
        _ROUTER,
    ),
    Mutation(
        "order",
        "the last of equal priorities gets no slot",
        _SELECT,
        "(tl.cumsum(tied, axis=0) <= free_ties)",
        "(tl.cumsum(tied, axis=0) < free_ties)",
        (_SLOTS.format(3, "select", "ties", "True"),),
    ),
    Mutation(
        "order",
        "negative gates are in the wrong order",
        _SORT,
        "return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)",
        "return bits",
        (_SLOTS.format(3, "select", "negative", "True"),),
    ),
    Mutation(
        "order",
        "a choice counts itself as one before it",
        _SORT,
        "(others[None, :] < places[:, None])",
        "(others[None, :] <= places[:, None])",
        (_SLOTS.format(2, "sort", "random", "False"),),
    ),
    Mutation(
        "boundary",
        "the smaller last group has the capacity of the others",
        _SORT,
        "limit = tl.where(size < group_size, last_capacity, capacity)",
        "limit = tl.where(size < group_size, capacity, capacity)",
        (_SLOTS.format(2, "sort", "random", "False"),),
    ),
    Mutation(
        "boundary",
        "the last row without a choice is left as it was",
        _SELECT,
        "mask=rows < end - start)",
        "mask=rows < end - start - 1)",
        (_ROWS.format(3, "select", "random", "True"),),
    ),
    Mutation(
        "index",
        "with batch priority a row holds a token in place of a choice",
        _SELECT,
        "tl.store(choices_ptr + row, choices.to(tl.int32), mask=kept > 0)",
        "tl.store(choices_ptr + row, tokens.to(tl.int32), mask=kept > 0)",
        (_ROWS.format(3, "select", "random", "True"),),
    ),
    Mutation(
        "mask",
        "in vanilla order a dropped choice is written before the first row",
        _SELECT,
        "tl.store(choices_ptr + row, choices.to(tl.int32), mask=match & (row >= 0))",
        "tl.store(choices_ptr + row, choices.to(tl.int32), mask=match)",
        (_ROWS.format(3, "select", "one_expert", "False"),),
    ),
    Mutation(
        "index",
        "whole tiles of weights are read from the expert before",
        _GEMM,
        "w = tl.load(weight_ptr + offsets)\n",
        "w = tl.load(weight_ptr + offsets - tl.where(expert > 0, IN * OUT, 0))\n",
        _WHOLE_TILES,
    ),
    Mutation(
        "sum",
        "dropless experts begin a tile late where the rows before them fill their tiles",
        "routing/triton_dropless_slots.py",
        "padded = (sizes + tile - 1) // tile * tile",
        "padded = (sizes + tile) // tile * tile",
        _DROPLESS,
    ),
)
