"""What an exported file is made of: every expert is in it, and nothing in it depends on the values of the data."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vmoe_torch.control import moe_layers
from vmoe_torch.extras import how_to_install
from vmoe_torch.layers.int8_experts import int8_layers
from vmoe_torch.layers.quantised import plain

# Branches, loops, and shapes that depend on values, in ONNX and among torch's higher-order operators.
ONNX_DEPENDENT = frozenset({"If", "Loop", "Scan", "NonZero", "Compress", "Unique"})
TORCH_DEPENDENT = frozenset({"cond", "while_loop", "scan", "map", "map_impl", "associative_scan"})
# Operators that read a part of a tensor: what they read of a weight is not all experts.
_ONNX_PARTS = frozenset({"Slice", "Gather", "GatherND", "GatherElements", "Split"})
_TORCH_PARTS = frozenset({"slice", "select", "index", "index_select", "gather", "narrow", "split", "unbind"})


def count_experts(file: Path | str | ExportedProgram, model: nn.Module) -> dict[str, int]:
    """Looks for every expert of a model in a file that was made of it, and for operators that depend on data.

    An expert is there if each of its weights is, to the bit, and is read whole on a way to the logits. Of a soft
    router's own weights a file may hold what was made of them, so they are not looked for.

    Args:
        file: an .onnx or .pt2 file, or a program of `export_program`.
        model: what it was made of.

    Returns:
        {layer name: number of its experts}, all of which are there.

    Raises:
        ValueError: if a weight of an expert or of a router is missing, or an operator depends on data: If, Loop,
            NonZero and their like in ONNX; nonzero, item and their like, or a branch or loop, in torch.
    """
    if isinstance(file, ExportedProgram):
        name, (dependent, held) = "the program", _of_program(file)
    elif Path(file).suffix == ".onnx":
        name, (dependent, held) = str(file), _of_onnx(file)
    else:
        name, (dependent, held) = str(file), _of_program(torch.export.load(file))
    if dependent:
        raise ValueError(f"{name} must have no operator that depends on data, got {', '.join(sorted(dependent))}")
    found = {}
    for layer_name, layer in moe_layers(model).items():
        for key, *forms in _weights(layer):
            if key.startswith("router.") and key != "router.weight":
                # An exporter folds what a soft router makes of its slots.
                continue
            for number, parts in enumerate(zip(*map(_parts, forms))):
                if not any(_digests(part) & held for part in parts):
                    part = f" of expert {number}" if forms[0].dim() == 3 else ""
                    raise ValueError(f"{name} must hold {layer_name}.{key}{part} on a way to its output, it does not")
        found[layer_name] = layer.num_experts
    return found


def _weights(layer: nn.Module) -> Iterator[tuple[str, *tuple[Tensor, ...]]]:
    """Name and value of what must be in the file; of int8 weights also what an exporter may have folded them to."""
    for name, parameter in layer.named_parameters():
        yield name, plain(parameter)
    for name, linear in int8_layers(layer).items():
        yield f"{name}.weight", linear.weight, linear.floating_weight()


def _parts(parameter: Tensor) -> list[np.ndarray]:
    """A weight of all experts, (E, O, I), one by one; any other as it is, without dims of 1, which exporters add."""
    array = np.squeeze(_array(parameter))
    return list(array) if array.ndim == 3 else [array]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # Numpy has no bfloat16: its bits will do.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def _digests(array: np.ndarray) -> set[tuple[tuple[int, ...], bytes]]:
    """Of an array and, for a matrix, its transpose: an exporter may have turned it."""
    forms = [array, array.T] if array.ndim == 2 else [array]
    return {(form.shape, np.ascontiguousarray(form).tobytes()) for form in forms}


def _held(arrays: Iterable[np.ndarray]) -> set:
    held = set()
    for array in map(np.squeeze, arrays):
        for part in array if array.ndim == 3 else [array]:
            held.update(_digests(part))
    return held


def _of_program(program: ExportedProgram) -> tuple[set[str], set]:
    """Operators that depend on data, and the weights on a way to the output."""
    dependent = set()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            dependent |= {str(node.target) for node in module.graph.nodes if _depends(node)}
    signature, state = program.graph_signature, {**program.constants, **program.state_dict}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    alive = set(program.graph.output_node().all_input_nodes)
    for node in reversed(program.graph.nodes):
        if node in alive:
            alive.update(node.all_input_nodes)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    read = [
        names[name]
        for name, node in placeholders.items()
        if name in names and any(user in alive and not _takes_a_part(user, node) for user in node.users)
    ]
    return dependent, _held(_array(state[name]) for name in read if isinstance(state.get(name), Tensor))


def _depends(node: torch.fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() in TORCH_DEPENDENT
    if target is torch.ops.aten.index.Tensor:
        # A mask is a NonZero in disguise, numbers are not.
        return any(index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8) for index in node.args[1])
    tags = getattr(target, "tags", ())
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


def _takes_a_part(user: torch.fx.Node, weight: torch.fx.Node) -> bool:
    name = str(getattr(user.target, "_schema", user.target)).partition("(")[0]
    return user.args[:1] == (weight,) and name.removeprefix("aten::").partition(".")[0] in _TORCH_PARTS


def _of_onnx(path: Path | str) -> tuple[set[str], set]:
    """The same of an ONNX file."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError(f"ONNX needs {how_to_install('onnx')}, got {error}") from error
    model = onnx.load(str(path))
    graphs = [model.graph, *model.functions]
    dependent = {node.op_type for graph in graphs for node in graph.node} & ONNX_DEPENDENT
    arrays: dict[str, Any] = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    alive, whole = {output.name for output in model.graph.output}, set()
    # Nodes stand in the order in which they run.
    for node in reversed(model.graph.node):
        if alive.isdisjoint(node.output):
            continue
        alive.update(node.input)
        whole.update(node.input[1:] if node.op_type in _ONNX_PARTS else node.input)
        if node.op_type == "Constant":
            value = next((each for each in node.attribute if each.name == "value"), None)
            if value is not None:
                arrays[node.output[0]] = onnx.numpy_helper.to_array(value.t)
    return dependent, _held(_plain_array(array) for name, array in arrays.items() if name in whole)


def _plain_array(array: np.ndarray) -> np.ndarray:
    return array.view(np.int16) if array.dtype.name == "bfloat16" else array
