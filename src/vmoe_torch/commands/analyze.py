"""`vmoe analyze`: a report on what a model's experts do, and on what its routers and its capacity are worth."""

import argparse
import os
from pathlib import Path

from timm.data import ImageNetInfo

from vmoe_torch.commands import options as opt
from vmoe_torch.commands.images import batches, open_images, tell, warn
from vmoe_torch.commands.sources import open_model
from vmoe_torch.data.names import shown
from vmoe_torch.evaluate import evaluate


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "analyze",
        help="report on what a model's experts do",
        description="Writes an HTML report with the analyses of the V-MoE paper: which expert processes which classes "
        "and which places of the image, loads and gates, which patches are kept as the capacity falls, accuracy "
        "against compute, and what random routers and other numbers of experts cost. report.json holds the numbers.",
        epilog="example: vmoe analyze runs/mine --data IMAGES --dense runs/dense --out report",
    )
    opt.add_model(parser)
    opt.add_data(parser)
    opt.add_sample(parser, 2000)
    opt.add_routing(parser, several=True, order=False, capacity="1,0.5,0.25,0.1", k="as MODEL is set, and 1")
    opt.add_device(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="write the report to this folder, new or not")
    parser.add_argument("--dense", metavar="MODEL", help="another model to compare with, on the same images")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    # Drawing takes long to import, and other commands do without.
    from vmoe_torch.analyze import CAPACITY_FACTORS, Section, analyze, describe_model, sample

    out = Path(options.out)
    _check_folder(out)
    source = open_model(options.model, options.device, average=opt.wants_average(options))
    images = open_images(source, options.data, options.split)
    names = images.class_names
    dense = None
    if options.dense is not None:
        other = open_model(options.dense, options.device)
        dense = (other, open_images(other, options.data, options.split))
    analysis = analyze(
        source.model,
        sample(images, options.images, options.seed),
        source.transform,
        None if names is None else _readable(names),
        capacity_factors=options.capacity or CAPACITY_FACTORS,
        num_selected_experts=options.k,
        seed=options.seed,
        batch_size=options.batch_size,
        workers=options.workers,
        max_broken=options.max_broken,
        warn=warn,
        progress=opt.progress,
    )
    if dense is not None:
        other, other_images = dense
        chosen = sample(other_images, options.images, options.seed)
        loader = batches(other, chosen, options)
        (reached,) = evaluate(other.model, loader, progress=opt.progress("the model to compare with"))
        analysis = analysis.with_dense(reached, _short(options.dense))
    facts = {
        "Model": f"{options.model}: {describe_model(source.model)}",
        "Routing": analysis.routing,
        "Data": f"{images.title}: {analysis.own.images:,} of {len(images):,} images, drawn with seed {options.seed}",
        "Images": images.described(),
    }
    if options.dense is not None:
        facts["Compared with"] = options.dense
    about = Section("What was analysed", facts=facts)
    path = analysis.write(out, f"What the experts of {_short(options.model)} do", [about])
    tell("data", images)
    print(f"report: {shown(path.resolve())}")
    return 0


def _check_folder(out: Path) -> None:
    """Raises ValueError if no report could be written there: before the work, not after."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out must be a folder that can be written to, got {out}")


def _short(name: str) -> str:
    """A model's name without the folders it lies in."""
    return Path(name).name or name


def _readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Words for WordNet's numbers, where all classes are those of ImageNet; other names stay."""
    info = ImageNetInfo()
    known = set(info.label_names())
    if not set(names) <= known:
        return names
    return tuple(info.label_name_to_description(name, detailed=False) for name in names)
