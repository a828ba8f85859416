"""`vmoe export`: a model as a .pt2 or ONNX file that runs without this package, checked against the model."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from vmoe_torch.budget import LayerSetting
from vmoe_torch.budget.settings import assign
from vmoe_torch.commands.options import ORDERS, add_weights, wants_average, writable
from vmoe_torch.commands.sources import MODEL_HELP, open_model
from vmoe_torch.control import moe_layers, set_routing
from vmoe_torch.export import check_compiled, check_file, export_program, files_of, save_onnx, save_pt2

SAVE = {".pt2": save_pt2, ".onnx": save_onnx}


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write an ONNX or .pt2 file",
        description="Writes a model as a file of standard operators, runs the file and compares its logits.",
        epilog="example: vmoe export runs/mine mine.onnx --batch dynamic --group-size image --capacity 0.5 --order bpr",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="file to write: .onnx, or .pt2 for torch.export.load")
    parser.add_argument(
        "--batch", type=_batch, default=1, metavar="N", help='images per run, or "dynamic" (default: 1)'
    )
    parser.add_argument("--capacity", type=float, metavar="C", help="slots per expert, times the balanced load")
    parser.add_argument("--k", type=int, metavar="K", help="experts per token")
    parser.add_argument("--order", choices=tuple(ORDERS), help="who drops last")
    parser.add_argument("--group-size", type=_group, metavar="N", help="images routed together, image or batch")
    parser.add_argument("--budget", metavar="FILE", help="take what vmoe budget chose and wrote there")
    parser.add_argument("--compile", action="store_true", help="also check torch.compile(model, fullgraph=True)")
    add_weights(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    suffix = Path(options.out).suffix
    if suffix not in SAVE:
        raise ValueError(f"OUT must end in {' or '.join(SAVE)}, got {options.out}")
    writable(options.out, "OUT")
    source = open_model(options.model, average=wants_average(options))
    model = source.model
    changes = {
        "capacity_factor": options.capacity,
        "num_selected_experts": options.k,
        "batch_priority": None if options.order is None else ORDERS[options.order],
        "group_size": options.group_size,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    fixed = [name for name in ("capacity", "k", "order") if getattr(options, name) is not None]
    if options.budget is not None and fixed:
        raise ValueError(f"--budget sets capacity, K and order of each layer, got --{' --'.join(fixed)} as well")
    if (changes or options.budget) and not moe_layers(model):
        raise ValueError(f"routing can only be set in a model with MoE layers, got {options.model}")
    if options.budget is not None:
        assign(model, _chosen(options.budget))
    if changes:
        set_routing(model, **changes)
    dynamic = options.batch == "dynamic"
    shape = (2 if dynamic else options.batch, *source.transform(Image.new(source.mode, (64, 64))).shape)
    program = export_program(model, torch.zeros(shape), dynamic_batch=dynamic)
    out = Path(options.out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        # Only what gives the model's logits takes the place of what is there.
        path = Path(folder) / out.name
        SAVE[suffix](program, path)
        # A batch of its own size shows that a dynamic one is taken.
        difference = check_file(path, model, (3 if dynamic else options.batch, *shape[1:]))
        files = files_of(path)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            file.replace(out.parent / file.name)
    print(f"{options.out}: images ({options.batch}, {', '.join(map(str, shape[1:]))}) to logits, {size / 1e6:.1f} MB")
    print(f"its logits are the model's: largest difference {difference:.1e} of the largest logit")
    if options.compile:
        difference = check_compiled(model, shape)
        print(f"torch.compile gives them too: largest difference {difference:.1e}")
    return 0


def _chosen(path: str) -> dict[str, LayerSetting]:
    """The settings in a file of `vmoe budget`."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["chosen"]["settings"]
        return {name: LayerSetting(**setting) for name, setting in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--budget must be a file that vmoe budget wrote, got {path}: {error}") from error


def _batch(text: str) -> int | str:
    if text == "dynamic":
        return text
    return _count(text, "dynamic")


def _group(text: str) -> int | str:
    if text in ("image", "batch"):
        return text
    return _count(text, "image or batch")


def _count(text: str, words: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, or {words}, got {text!r}")
    return int(text)
