"""`vmoe export`: a model as a .pt2 or ONNX file that runs without this package, checked against the model."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

from vmoe_torch.budget import LayerSetting
from vmoe_torch.budget.settings import assign
from vmoe_torch.commands import options as opt
from vmoe_torch.commands.sources import open_model
from vmoe_torch.export import check_compiled, check_file, count_experts, export_program, files_of, save_onnx, save_pt2

SAVE = {".pt2": save_pt2, ".onnx": save_onnx}


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write an ONNX or .pt2 file",
        description="Writes a model as a file of standard operators, runs the file and compares its logits.",
        epilog="example: vmoe export runs/mine mine.onnx --batch-size dynamic --group-size image --capacity 0.5",
    )
    opt.add_model(parser)
    parser.add_argument("out", metavar="OUT", help="file to write: .onnx, or .pt2 for torch.export.load")
    parser.add_argument(
        "--batch-size",
        type=opt.count_or("dynamic"),
        default=1,
        metavar="N",
        help='images per forward, or "dynamic" (default: 1)',
    )
    opt.add_routing(parser)
    text = "images routed together, image or batch (default: as MODEL is set)"
    parser.add_argument("--group-size", type=opt.count_or("image", "batch"), metavar="N", help=text)
    parser.add_argument("--budget", metavar="FILE", help="take what vmoe budget chose and wrote there")
    parser.add_argument("--compile", action="store_true", help="also check torch.compile(model, fullgraph=True)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    suffix = Path(options.out).suffix
    if suffix not in SAVE:
        raise ValueError(f"OUT must end in {' or '.join(SAVE)}, got {options.out}")
    opt.writable(options.out, "OUT")
    source = open_model(options.model, average=opt.wants_average(options))
    model = source.model
    fixed = [option for option in opt.routing_given(options) if option != "--group-size"]
    if options.budget is not None and fixed:
        raise ValueError(
            f"--budget sets capacity, K, order, mean and threshold of each layer, got {' '.join(fixed)} as well"
        )
    if options.budget is not None:
        opt.check_sparse(model, options, "for --budget")
        assign(model, _chosen(options.budget))
    opt.route(model, options, group_size=options.group_size)
    dynamic = options.batch_size == "dynamic"
    shape = (2 if dynamic else options.batch_size, *source.transform(Image.new(source.mode, (64, 64))).shape)
    program = export_program(model, torch.zeros(shape), dynamic_batch=dynamic)
    out = Path(options.out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        # Only what gives the model's logits takes the place of what is there.
        path = Path(folder) / out.name
        SAVE[suffix](program, path)
        # A batch of its own size shows that a dynamic one is taken.
        difference = check_file(path, model, (3 if dynamic else options.batch_size, *shape[1:]))
        experts = count_experts(path, model)
        files = files_of(path)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            file.replace(out.parent / file.name)
    shown = f"({options.batch_size}, {', '.join(map(str, shape[1:]))})"
    print(f"{options.out}: images {shown} to logits, {size / 1e6:.1f} MB")
    print(f"its logits are the model's: largest difference {difference:.1e} of the largest logit")
    print(f"all {sum(experts.values())} experts of {len(experts)} layers are in it, and nothing depends on data")
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
