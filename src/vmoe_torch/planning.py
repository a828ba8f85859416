"""What a training step of a model on many GPUs holds, moves and takes, computed on paper: no GPU, no weights.

Byte counts follow what the code does and are tested against real runs; times follow from the rates in `GPUS` and the
assumed shares of them, and are estimates. Over 400 lines: all that is counted stands beside what counts it.

Dims: B images of a rank, L tokens per image, T = B * L, D width, H hidden width, E experts, K selected, R rows per
expert and rank, N ranks of one set of experts.
"""

from dataclasses import dataclass, replace
from math import prod

from torch import Size, nn

from vmoe_kernels import num_groups
from vmoe_kernels.common.checks import check_integer
from vmoe_kernels.common.flops import linear_flops, mlp_flops
from vmoe_torch.layers import MoeMlp
from vmoe_torch.layers.of_model import moe_layers
from vmoe_torch.layers.settings import DROPLESS, refuse_dropless

MASTER = 4  # bytes of a parameter, of its gradient, and of each of AdamW's two moments: float32
LABEL = 4  # bytes of what routing keeps: float32 and int32
# Assumed shares of the peak rates that a training step reaches, and of the memory that tensors may fill.
COMPUTE_SHARE, LINK_SHARE, MEMORY_SHARE = 0.45, 0.75, 0.9


@dataclass(frozen=True)
class Gpu:
    """Vendor's peaks of one GPU.

    The network is assumed: one 200 Gbit/s (A100) or 400 Gbit/s adapter per GPU, eight GPUs per node.
    """

    memory: float
    """Memory in bytes."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    link: float
    """Bytes/s in one direction inside a node."""
    network: float
    """Bytes/s in one direction between nodes."""
    per_node: int = 8
    """GPUs of a node."""


GPUS = {
    "a100": Gpu(80e9, 312e12, 300e9, 25e9),
    "h100": Gpu(80e9, 989e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989e12, 450e9, 50e9),
    "b200": Gpu(180e9, 2250e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class PlannedRun:
    """A run to plan."""

    gpus: int
    """Number of GPUs, a multiple of `ep`."""
    ep: int
    """GPUs that one set of experts is spread over, at least 1."""
    batch: int
    """Images per step over all GPUs, a multiple of `gpus`: the forwards of one accumulation step alone."""
    gpu: str = "h200"
    """One of `GPUS`."""
    recompute: bool = False
    """Whether the backward recomputes activations."""
    compute_bytes: int = 2
    """Bytes of an activation and of a gathered parameter; 2 is bfloat16."""
    wire_bytes: int = 2
    """Bytes of a value on the wire between experts."""
    autocast: bool = False
    """Whether autocast computes in these bytes, as `vmoe train` does, over parameters, norms and a residual stream in
    float32; or FSDP casts the parameters as it gathers them (`parallelize(param_dtype=...)`), and all is in them."""

    def check(self, model: nn.Module) -> None:
        """Raises ValueError if the run cannot be set up."""
        if self.gpu not in GPUS:
            raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {self.gpu!r}")
        for name in ("gpus", "ep", "batch"):
            check_integer(name, getattr(self, name), 1)
        if self.gpus % self.ep:
            raise ValueError(f"ep must divide the number of GPUs, got ep={self.ep} and gpus={self.gpus}")
        if self.batch % self.gpus:
            raise ValueError(f"batch must be a positive multiple of gpus={self.gpus}, got {self.batch}")
        if not all(hasattr(model, part) for part in ("patch_embed", "blocks", "pre_logits")):
            raise ValueError(f"the model must be a VMoE, got {type(model).__name__}")
        for layer in (block.mlp for block in model.blocks if isinstance(block.mlp, MoeMlp)):
            layer.sizes.check_ranks(self.ep)
            if self.ep > 1 and layer.capacity_factor == DROPLESS:
                refuse_dropless(self.ep)

    @property
    def dp(self) -> int:
        """Replicas of the experts."""
        return self.gpus // self.ep

    @property
    def stream_bytes(self) -> int:
        """Bytes of a value between the blocks, and of a gathered parameter."""
        return MASTER if self.autocast else self.compute_bytes


@dataclass(frozen=True)
class PlannedStep:
    """Per rank (the first, which never holds less than another): bytes held, bytes sent per step, seconds per step."""

    settings: PlannedRun
    """The run."""
    parameters: int
    """Bytes of the parameters."""
    gradients: int
    """Bytes of the gradients."""
    optimizer: int
    """Bytes of AdamW's moments."""
    activations: int
    """Bytes that autograd keeps at the end of the forward; with recomputation also those of the block that is
    recomputed."""
    gathered: int
    """Bytes of the parameters of two FSDP units, gathered, and of the gradients of one on their way to be reduced."""
    exchange_buffers: int
    """Bytes of the rows of one layer as they leave and as they arrive."""
    exchange_per_layer: int
    """Bytes of the all-to-all in one layer's forward: dispatch and combine, to other ranks."""
    exchange_per_step: int
    """Bytes of the all-to-all in a step: every layer, forward and backward (and the recomputation's forward)."""
    shards_per_step: int
    """Bytes of FSDP's gathers and reductions in a step."""
    flops_per_step: float
    """FLOPs, a multiply-add counting as two."""
    compute_seconds: float
    """Seconds of the computation."""
    exchange_seconds: float
    """Seconds of the all-to-all."""
    shards_seconds: float
    """Seconds of FSDP's transfers."""

    @property
    def held(self) -> int:
        """Bytes of all tensors together."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.gathered + self.exchange_buffers

    @property
    def capacity(self) -> float:
        """Bytes that tensors may fill."""
        return GPUS[self.settings.gpu].memory * MEMORY_SHARE

    @property
    def fits(self) -> bool:
        """Whether the tensors fit."""
        return self.held <= self.capacity

    @property
    def step_seconds(self) -> float:
        """FSDP's transfers overlap the computation; the all-to-all is taken not to."""
        return max(self.compute_seconds, self.shards_seconds) + self.exchange_seconds


def plan(model: nn.Module, settings: PlannedRun) -> PlannedStep:
    """Plans a training step with AdamW in float32 and compute in `settings.compute_bytes`, without dropout.

    Args:
        model: VMoE, on any device; the meta device is enough.
        settings: of the run.

    Raises:
        ValueError: if the numbers do not divide, or the GPU is unknown.
    """
    settings.check(model)
    gpu, stream = GPUS[settings.gpu], settings.stream_bytes
    images = settings.batch // settings.gpus
    tokens = images * (model.patch_embed.num_patches + model.num_prefix_tokens)
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoeMlp)]

    parameters = MASTER * _local_parameters(model, settings)
    units = _unit_sizes(model, settings)
    largest = max(size for size, _ in units)
    per_block = [_block_activations(block, images, tokens, settings) for block in model.blocks]
    if settings.recompute:
        width = model.embed_dim
        inputs = sum(tokens * width * stream + _routing_bytes(block.mlp, tokens) for block in model.blocks)
        kept = inputs + max(per_block)
    else:
        kept = sum(per_block)

    buffers = [_rows(layer, images, tokens) * model.embed_dim for layer in layers]
    sent = [2 * size * settings.wire_bytes * (settings.ep - 1) // settings.ep for size in buffers]
    passes = 3 if settings.recompute else 2
    gathers = 2 * stream + MASTER
    shards = int(sum(size * gathers * (ranks - 1) / ranks for size, ranks in units))
    # Routers are not gathered, their gradients are summed.
    routers = _numbers(*(layer.router for layer in layers))
    shards += int(2 * MASTER * routers * (settings.gpus - 1) / settings.gpus)
    flops = (4 if settings.recompute else 3) * forward_flops(model, images)
    return PlannedStep(
        settings=settings,
        parameters=parameters,
        gradients=parameters,
        optimizer=2 * parameters,
        activations=kept + _ends_activations(model, images, tokens, settings),
        gathered=largest * (2 * stream + stream + MASTER) if settings.gpus > 1 else 0,
        exchange_buffers=2 * settings.wire_bytes * max(buffers, default=0),
        exchange_per_layer=max(sent, default=0),
        exchange_per_step=passes * sum(sent),
        shards_per_step=shards,
        flops_per_step=flops,
        compute_seconds=flops / (gpu.flops * COMPUTE_SHARE),
        exchange_seconds=passes * sum(2 * size * settings.wire_bytes for size in buffers) * _seconds_per_byte(settings),
        shards_seconds=shards / ((gpu.link if settings.gpus <= gpu.per_node else gpu.network) * LINK_SHARE),
    )


def changes_that_fit(model: nn.Module, settings: PlannedRun) -> list[tuple[str, PlannedStep]]:
    """The smallest change of each kind with which the run fits, and its plan."""
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoeMlp)]
    # Of every size; without capacities the experts of a layer stay together.
    experts = [n for layer in layers for n in ([1] if layer.capacity_factor == DROPLESS else layer.sizes.counts())]
    again = replace(settings, recompute=True)
    kinds = [[("recompute the activations", again)]]
    doubled = [settings.ep * 2**i for i in range(1, 12)]
    kinds.append([(f"ep={ep} and recompute", replace(again, ep=ep)) for ep in doubled])
    smaller = [settings.batch // 2**i for i in range(1, 24) if settings.batch % 2**i == 0]
    kinds.append([(f"batch={batch} and recompute", replace(again, batch=batch)) for batch in smaller])
    more = [settings.gpus * 2**i for i in range(1, 12)]
    kinds.append([(f"gpus={gpus} and recompute", replace(again, gpus=gpus)) for gpus in more])
    found = []
    for options in kinds:
        for text, option in options:
            possible = option.gpus % option.ep == 0 and option.batch % option.gpus == 0
            if possible and all(count % option.ep == 0 for count in experts) and (new := plan(model, option)).fits:
                found.append((text, new))
                break
    return found


def forward_flops(model: nn.Module, images: int) -> int:
    """FLOPs of the matrix products of a forward of so many images; experts at full capacity, in training mode."""
    patches = images * model.patch_embed.num_patches
    length = model.patch_embed.num_patches + model.num_prefix_tokens
    tokens = images * length
    flops = linear_flops(patches, model.patch_embed.proj.weight.flatten(1).shape)
    for part in (*model.pre_logits.modules(), model.head):
        flops += linear_flops(images, part.weight.shape) if isinstance(part, nn.Linear) else 0
    for block in model.blocks:
        flops += mlp_flops(tokens, block.attn.qkv.weight.shape, block.attn.proj.weight.shape)
        flops += 2 * linear_flops(tokens, (length, model.embed_dim))  # scores, and what they weigh
        mlp = block.mlp
        if isinstance(mlp, MoeMlp):
            flops += mlp.flops(tokens, _rows(mlp, images, tokens))
        else:
            flops += mlp_flops(tokens, mlp.fc1.weight.shape, mlp.fc2.weight.shape)
    return flops


def _rows(layer: MoeMlp, images: int, tokens: int) -> int:
    """Rows of all experts in a training forward."""
    router = layer.own_router()
    mode, router.training = router.training, True
    rows = layer.num_rows(tokens, tokens // images)
    router.training = mode
    return rows


def _routing_bytes(mlp: nn.Module, tokens: int) -> int:
    """What its router says: for top experts, logits (T, E); gates, experts and slots (T, K)."""
    if not isinstance(mlp, MoeMlp):
        return 0
    return LABEL * tokens * mlp.own_router().kept_numbers()


def _block_activations(block: nn.Module, images: int, tokens: int, settings: PlannedRun) -> int:
    """Bytes that autograd keeps of one block: each tensor once, however many ops keep it."""
    width, heads = block.norm1.weight.shape[0], block.attn.num_heads
    a, stream = settings.compute_bytes, settings.stream_bytes
    mlp = block.mlp
    sparse = isinstance(mlp, MoeMlp)
    # norm1's output, q, k, v, attention's output; the inputs of both norms.
    kept = tokens * width * (5 * a + 2 * stream)
    # norm2's output, which a router takes as it is.
    kept += tokens * width * (stream if sparse else a)
    if settings.autocast:
        # Its copies of the weights, and of the experts' biases.
        if sparse:
            copied = _numbers(mlp.fc1, mlp.fc2) // settings.ep
            if mlp.shared_expert is not None:
                # And of its input.
                copied += mlp.shared_expert.fc1.weight.numel() + mlp.shared_expert.fc2.weight.numel() + tokens * width
        else:
            copied = mlp.fc1.weight.numel() + mlp.fc2.weight.numel()
        kept += a * (block.attn.qkv.weight.numel() + block.attn.proj.weight.numel() + copied)
    # Mean and deviation of two norms, and the attention's logsumexp, in float32.
    kept += 4 * tokens * (4 + heads)
    kept += sum(tokens * width * a for scale in (block.ls1, block.ls2) if not isinstance(scale, nn.Identity))
    if not isinstance(block.attn.q_norm, nn.Identity):
        # As measured: both normalised, and once more their size for the rest; mean and deviation of both.
        kept += 3 * tokens * width * a + 16 * tokens * heads
    if not sparse:
        # Before and after the activation.
        return kept + 2 * tokens * mlp.fc1.weight.shape[0] * a
    rows = _rows(mlp, images, tokens)
    groups = num_groups(tokens, mlp.group_size * (tokens // images) or tokens)
    # Rows that arrived, the pre-activation, and the outputs that came back; per group and expert, what losses keep.
    hidden = sum(mlp.expert_hidden) / mlp.num_experts
    kept += int(rows * (2 * width + hidden)) * a + 6 * LABEL * groups * mlp.num_experts
    if mlp.shared_expert is not None:
        # Before and after the activation.
        kept += 2 * tokens * mlp.shared_expert.fc1.out_features * a
    return kept + _routing_bytes(mlp, tokens)


def _ends_activations(model: nn.Module, images: int, tokens: int, settings: PlannedRun) -> int:
    """Images, the last norm's input and output, and the log-probabilities of the loss in float32."""
    a = settings.compute_bytes
    pixels = model.patch_embed.proj.weight[0].numel() * model.patch_embed.num_patches
    kept = images * pixels * a + tokens * model.embed_dim * settings.stream_bytes
    kept += 8 * tokens + 4 * images * model.num_classes
    if not settings.autocast:
        return kept + tokens * model.embed_dim * a
    # Of the output the head's copy only; and copies of the weights.
    parts = (model.patch_embed.proj, *model.pre_logits.modules(), model.head)
    weights = sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d))
    return kept + a * (images * model.embed_dim + weights)


def _numbers(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def _part(shape: Size, dim: int, ranks: int) -> int:
    """Numbers of the first rank's part."""
    return prod(shape) // max(shape[dim], 1) * -(-shape[dim] // ranks)


def _local_parameters(model: nn.Module, settings: PlannedRun) -> int:
    """Numbers of all parameters that the first rank keeps, as `parallelize` shards them."""
    layers = moe_layers(model).values()
    in_layers = {id(p) for layer in layers for part in (layer.router, layer.fc1, layer.fc2) for p in part.parameters()}
    total = sum(_part(p.shape or Size([1]), 0, settings.gpus) for p in model.parameters() if id(p) not in in_layers)
    for layer in layers:
        # Whole on every rank.
        total += _numbers(layer.router)
        for fc in (layer.fc1, layer.fc2):
            for parameter in fc.parameters():
                shape = Size([parameter.shape[0] // settings.ep, *parameter.shape[1:]])
                total += _part(shape, 1 if shape[1] % settings.dp == 0 else 0, settings.dp)
    return total


def _unit_sizes(model: nn.Module, settings: PlannedRun) -> list[tuple[int, int]]:
    """Numbers of parameters that each FSDP unit gathers on a rank, and over how many ranks."""
    units, rest = [], _numbers(model)
    for block in model.blocks:
        size = whole = _numbers(block)
        rest -= whole
        if isinstance(block.mlp, MoeMlp):
            mlp = block.mlp
            router, experts, shared = _numbers(mlp.router), _numbers(mlp.fc1, mlp.fc2), _numbers(mlp.shared_expert)
            units += [(experts // settings.ep, settings.dp), (shared, settings.gpus)]
            size -= experts + router + shared
        units.append((size, settings.gpus))
    return [*units, (rest, settings.gpus)]


def _seconds_per_byte(settings: PlannedRun) -> float:
    """Of a byte of a rank's buffers: both kinds of links work at once, and the rank's own share stays."""
    gpu, ep = GPUS[settings.gpu], settings.ep
    near = min(ep, gpu.per_node)
    inside, between = (near - 1) / ep / gpu.link, (ep - near) / ep / gpu.network
    return max(inside, between) / LINK_SHARE


def describe(result: PlannedStep, changes: list[tuple[str, PlannedStep]]) -> str:
    """A table for the terminal; `changes` as `changes_that_fit` gives them."""
    s, gpu = result.settings, GPUS[result.settings.gpu]
    held = (
        ("parameters", result.parameters),
        ("gradients", result.gradients),
        ("AdamW's moments", result.optimizer),
        ("activations", result.activations),
        ("gathered by FSDP", result.gathered),
        ("exchange buffers", result.exchange_buffers),
        ("total", result.held),
    )
    moved = (
        ("all-to-all per layer, forward", result.exchange_per_layer),
        ("all-to-all per step", result.exchange_per_step),
        ("FSDP per step", result.shards_per_step),
    )
    times = (
        ("compute", result.compute_seconds),
        ("all-to-all", result.exchange_seconds),
        ("FSDP, overlapped", result.shards_seconds),
        ("step", result.step_seconds),
    )
    lines = [f"{s.gpus} x {s.gpu}, dp={s.dp}, ep={s.ep}, {s.batch} images per step, {s.batch // s.gpus} per GPU", ""]
    lines += ["held per GPU, GB", *(f"  {name:<32}{size / 1e9:>10.2f}" for name, size in held), ""]
    lines += ["sent per GPU, GB", *(f"  {name:<32}{size / 1e9:>10.3f}" for name, size in moved), ""]
    lines += ["estimated time, ms", *(f"  {name:<32}{seconds * 1e3:>10.1f}" for name, seconds in times)]
    lines += [
        f"  {'images per second':<32}{s.batch / result.step_seconds:>10.0f}",
        "",
        f"assumed of a {s.gpu}: {COMPUTE_SHARE:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s; {LINK_SHARE:.0%} of "
        f"{gpu.link / 1e9:.0f} GB/s inside a node of {gpu.per_node} and of {gpu.network / 1e9:.0f} GB/s between nodes; "
        "experts at full capacity",
    ]
    limit = f"{MEMORY_SHARE:.0%} of {gpu.memory / 1e9:.0f} GB"
    if result.fits:
        return "\n".join([*lines, f"fits: {result.held / 1e9:.1f} GB are within {limit}"])
    lines.append(f"does not fit: {result.held / 1e9:.1f} GB are above {limit}; these changes fit:")
    found = [f"  {text}: {new.held / 1e9:.1f} GB, {new.step_seconds * 1e3:.0f} ms per step" for text, new in changes]
    return "\n".join([*lines, *(found or ["  none of recomputation, a larger ep, a smaller batch, more GPUs"])])
