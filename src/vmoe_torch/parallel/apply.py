"""One call makes a single-device model a distributed one, in the order that works.

1. Ranks compare their models and arguments; all weights and buffers become those of the first rank.
2. Experts become DTensors, Shard(0) over `ep`; routers stay whole on every rank; the exchange goes into each MoeMlp.
3. Blocks recompute their activations in the backward, but keep their routing.
4. Blocks are compiled.
5. FSDP2 shards experts over `dp` and everything else, but routers, over `dp x ep`.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from vmoe_torch.layers import MoeMlp
from vmoe_torch.layers.int8_experts import refuse_int8
from vmoe_torch.layers.of_model import moe_layers
from vmoe_torch.layers.settings import DROPLESS, refuse_dropless
from vmoe_torch.parallel.exchange import ExpertExchange
from vmoe_torch.parallel.forwards import Forwards, routing_settings
from vmoe_torch.parallel.mesh import by_mesh, keep_timeout
from vmoe_torch.parallel.ranks.agreement import require_same
from vmoe_torch.parallel.recompute import recompute_block


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    wire_dtype: torch.dtype | None = None,
    chunks: int = 1,
    ranks_per_node: int = 0,
    recompute: bool = False,
    compile: bool = False,
    param_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
) -> nn.Module:
    """Parallelises a model with MoE layers in place; gradients are averaged over all ranks of the mesh.

    All weights and buffers, experts too, become those of the first rank, as with DistributedDataParallel. Every rank
    must give the same number of images, and route alike, in every forward; ranks compare both.

    Args:
        model: on its device, with `blocks` (VMoE); on the meta device, `materialize` fills it afterwards.
        mesh: with axes `dp` and `ep` (see `build_mesh`).
        wire_dtype: dtype of rows on the wire, e.g. torch.bfloat16; None is that of the activations.
        chunks: parts along the capacity whose exchange overlaps the experts' work.
        ranks_per_node: M > 1 exchanges inside nodes of M ranks first, then between nodes.
        recompute: activation checkpointing of every block that saves the routing.
        compile: torch.compile of every block; with `recompute`, of a MoE block's attention and norms only.
        param_dtype: dtype of compute; None is that of the parameters. Reductions are in float32. Routers compute in
            float32 in any case, with weights that are not rounded.
        reshard_after_forward: frees gathered parameters between forward and backward.

    Returns:
        The model.

    Raises:
        ValueError: if the mesh lacks an axis, the model has no blocks or is parallelised already, the experts (of every
            size) do not divide among the ranks or have no capacities ("dropless" is for one rank's experts), a MoeMlp
            is not a block's, experts are int8, or ranks differ in the model, its routing or an argument.
    """
    names = mesh.mesh_dim_names or ()
    if names != ("dp", "ep"):
        raise ValueError(f"mesh must have the axes ('dp', 'ep'), got {names}")
    if not hasattr(model, "blocks"):
        raise ValueError(f"the model must have blocks, got {type(model).__name__}")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("the model must be on one device, got one that is parallelised already")
    refuse_int8(model, "to be parallelised")
    options = {
        "mesh": (mesh.device_type, tuple(mesh.shape)),
        "wire_dtype": wire_dtype,
        "chunks": chunks,
        "ranks_per_node": ranks_per_node,
        "recompute": recompute,
        "compile": compile,
        "param_dtype": param_dtype,
        "reshard_after_forward": reshard_after_forward,
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    require_same({**options, **{name: (tuple(t.shape), t.dtype, t.is_meta) for name, t in tensors.items()}})
    require_same(routing_settings(model))
    ep = mesh["ep"].size()
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoeMlp)]
    if len(layers) != len(moe_layers(model)):
        raise ValueError("every MoeMlp of the model must be the mlp of a block, got one elsewhere")
    for layer in layers:
        layer.sizes.check_ranks(ep)
        if ep > 1 and DROPLESS in (layer.capacity_factor, layer.eval_capacity_factor):
            refuse_dropless(ep)
    # One for all layers: each has process groups of its own where it has two levels.
    exchange = ExpertExchange(mesh["ep"].get_group(), wire_dtype, chunks, ranks_per_node)
    # Behind all that may refuse the model.
    _take_from_first(tensors.values(), mesh.device_type)
    Forwards(model, mesh.device_type)
    for layer in layers:
        _spread_experts(layer, mesh["ep"])
        _replicate_router(layer.router, mesh)
        layer.exchange = layer.own_router().exchange = exchange
        layer.ranks = ep
        for module in (layer, layer.shared_expert):
            if module is not None:
                module.register_forward_hook(_without_base)
    for block in model.blocks:
        if recompute:
            recompute_block(block)
        if compile and recompute and isinstance(block.mlp, MoeMlp):
            # The compiler does not look into a checkpoint with FSDP's hooks in it: those of the MoE layer.
            for part in (block.norm1, block.attn, block.norm2):
                part.compile()
        elif compile:
            block.compile()
    _shard_parameters(model, mesh, param_dtype, reshard_after_forward)
    return model


@torch.no_grad()
def _take_from_first(tensors: Iterable[Tensor], device_type: str) -> None:
    """Overwrites tensors with those of the first rank; on the meta device there is nothing to take."""
    for tensor in tensors:
        if tensor.is_meta or tensor.numel() == 0 or dist.get_world_size() == 1:
            continue
        # As bytes: no backend knows all dtypes.
        sent = tensor.detach().to(device_type).contiguous()
        dist.broadcast(sent.view(-1).view(torch.uint8), 0)
        tensor.detach().copy_(sent)


# In a graph it would be a view again; FSDP's hooks, beside which it stands, are in none either.
@torch.compiler.disable
def _without_base(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
    """The same memory, but no view, which FSDP warns of: blocks and layers add it out of place."""
    return torch.ops.aten._unsafe_view(output, output.shape)


def _spread_experts(layer: MoeMlp, ep: DeviceMesh) -> None:
    rank, size = ep.get_local_rank(), ep.size()
    for module in (*layer.fc1.linears(), *layer.fc2.linears()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            # A copy, so that the other ranks' experts are freed.
            part = parameter.detach().chunk(size)[rank].clone()
            spread = DTensor.from_local(part, ep, [Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))


def _replicate_router(router: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP leaves it alone: it would compute in param_dtype, and is too small to be worth gathering."""
    for name, parameter in list(router.named_parameters(recurse=False)):
        whole = DTensor.from_local(parameter.detach(), mesh, [Replicate(), Replicate()], run_check=False)
        setattr(router, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _shard_parameters(
    model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype | None, reshard_after_forward: bool
) -> None:
    routers = {parameter for layer in moe_layers(model).values() for parameter in layer.router.parameters()}
    options = {"reshard_after_forward": reshard_after_forward, "ignored_params": routers}
    if param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    everyone = mesh["dp", "ep"]._flatten("dp_ep")
    keep_timeout(everyone.get_group())
    units = []
    for block in model.blocks:
        if isinstance(block.mlp, MoeMlp):
            if block.mlp.shared_expert is not None:
                # No experts' parameter: every rank has its part, and adds to its gradient.
                fully_shard(block.mlp.shared_expert, mesh=everyone, **options)
                units.append(block.mlp.shared_expert)
            fully_shard(block.mlp, mesh=mesh["dp"], shard_placement_fn=_expert_placement(mesh["dp"].size()), **options)
            units.append(block.mlp)
        fully_shard(block, mesh=everyone, **options)
        units.append(block)
    fully_shard(model, mesh=everyone, **options)
    if mesh.device_type == "cpu":
        # gloo has neither averages nor scaled sums.
        for unit in (*units, model):
            unit.set_force_sum_reduction_for_comms(True)


def _expert_placement(dp: int):
    """Experts lie sharded over `ep` along dim 0, so FSDP takes dim 1 where it divides; the router has no such dim."""

    def place(parameter: nn.Parameter) -> Shard:
        spread = isinstance(parameter, DTensor) and any(placement.is_shard() for placement in parameter.placements)
        return Shard(1) if spread and parameter.shape[1] % dp == 0 else Shard(0)

    return place


def parameter_groups(groups: list[dict]) -> list[dict]:
    """Splits optimiser groups by mesh: an optimiser's multi-tensor step cannot mix meshes.

    Args:
        groups: as an optimiser takes them, each with "params".

    Returns:
        Groups with the same options, each on one mesh.
    """
    return [{**group, "params": params} for group in groups for params in by_mesh(group["params"])]
