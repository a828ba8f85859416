"""Models as files that run without this package: torch.export's .pt2 and ONNX, each held against the model."""

from vmoe_torch.export.census import count_experts
from vmoe_torch.export.check import check_compiled, check_file
from vmoe_torch.export.onnx_file import files_of, save_onnx
from vmoe_torch.export.program import export_program, save_pt2

__all__ = ["check_compiled", "check_file", "count_experts", "export_program", "files_of", "save_onnx", "save_pt2"]
