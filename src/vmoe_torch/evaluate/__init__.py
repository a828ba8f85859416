"""Evaluation of one set of weights: at many routing settings, with the FLOPs of each, and by few-shot transfer."""

from vmoe_torch.evaluate.classification import Evaluation, evaluate
from vmoe_torch.evaluate.flops import Flops, count_flops, ptflops_hooks
from vmoe_torch.evaluate.settings import RoutingSetting, setting_grid
from vmoe_torch.evaluate.table import as_rows, format_table, write_csv, write_json
from vmoe_torch.evaluate.transfer import FewShot, Task, fewshot, format_fewshot, write_fewshot
from vmoe_torch.evaluate.usage import expert_usage
from vmoe_torch.layers.usage import ExpertUsage

__all__ = [
    "Evaluation",
    "ExpertUsage",
    "FewShot",
    "Flops",
    "RoutingSetting",
    "Task",
    "as_rows",
    "count_flops",
    "evaluate",
    "expert_usage",
    "fewshot",
    "format_fewshot",
    "format_table",
    "ptflops_hooks",
    "setting_grid",
    "write_csv",
    "write_fewshot",
    "write_json",
]
