"""Evaluation of one set of weights at many routing settings, with the FLOPs of each."""

from vmoe_torch.evaluate.classification import Evaluation, evaluate
from vmoe_torch.evaluate.flops import Flops, count_flops
from vmoe_torch.evaluate.settings import RoutingSetting, setting_grid
from vmoe_torch.evaluate.table import as_rows, format_table, write_csv, write_json

__all__ = [
    "Evaluation",
    "Flops",
    "RoutingSetting",
    "as_rows",
    "count_flops",
    "evaluate",
    "format_table",
    "setting_grid",
    "write_csv",
    "write_json",
]
