"""ONNX files. What PyTorch's exporter lacks for our routing is a stable sort; ONNX has it in TopK."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import ExportedProgram

from vmoe_torch.extras import how_to_install

# Old enough for any runtime in use, and every operator that we need is there.
OPSET = 18


def save_onnx(program: ExportedProgram, path: Path | str) -> None:
    """Writes an ONNX file with one input "images" and one output "logits".

    Weights lie inside it up to 1.5 GB, and in a file PATH.data beside it if they are more.

    Raises:
        ValueError: if the packages of the extra `export` are missing.
    """
    # It warns about attributes that onnxscript itself leaves empty.
    ir = logging.getLogger("onnx_ir")
    level = ir.level
    ir.setLevel(logging.ERROR)
    try:
        torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
            verbose=False,
        ).save(path)
    finally:
        ir.setLevel(level)


def files_of(path: Path | str) -> list[Path]:
    """The file that was written there, and the one of its weights, if it has one."""
    return [file for file in (Path(path), Path(f"{path}.data")) if file.exists()]


def _stable_sort() -> Callable:
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ValueError(f"ONNX needs {how_to_install('onnxscript')}, got {error}") from error

    def stable_sort(values, *, stable=False, dim=-1, descending=False):
        # By its definition, TopK puts the lower index first where values are equal: that is a stable sort.
        count = op.Reshape(op.Gather(op.Shape(values), op.Constant(value_int=dim)), op.Constant(value_ints=[1]))
        return op.TopK(values, count, axis=dim, largest=int(descending), sorted=1)

    return stable_sort
