"""`vmoe convert`: the original's checkpoints to safetensors, and back."""

import argparse
import sys
from pathlib import Path

from vmoe_torch.commands.options import add_number, add_option, add_weights, wants_average, writable
from vmoe_torch.commands.sources import open_model
from vmoe_torch.parallel import export_safetensors
from vmoe_torch.train.rules import count
from vmoe_torch.weights.conversion import convert, export_original


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints of the original JAX V-MoE, and back",
        description="Converts PREFIX.index and PREFIX.data-nnnnn-of-NNNNN to one .safetensors file, or such one back. "
        "One of MODEL and OUT ends in .safetensors, the other one is a PREFIX; a MODEL may be a URL. A run, or "
        "whatever else is a MODEL of the other commands and a file or folder, becomes either. Its routing travels.",
        epilog="example: vmoe convert gs://vmoe_checkpoints/vmoe_s32_last2_ilsvrc2012_randaug_light1 s32.safetensors",
    )
    parser.add_argument("model", metavar="MODEL", help="PREFIX, FILE.safetensors, run folder or checkpoint to read")
    parser.add_argument("out", metavar="OUT", help="FILE.safetensors or PREFIX to write")
    parser.add_argument("--train-state", action="store_true", help="keep optimizer, step and random keys too")
    text = "attention heads, for a file that does not say it"
    add_option(parser, "--num-heads", count(1), type=int, metavar="N", help=text)
    add_number(parser, "--shards", 1, 1, "data files to write")
    add_weights(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    ends = [name.endswith(".safetensors") for name in (options.model, options.out)]
    whole = Path(options.model).exists() and not ends[0]
    if not whole and sum(ends) != 1:
        raise ValueError(f"one of the two names must end in .safetensors, got {options.model} and {options.out}")
    if whole:
        if options.train_state:
            raise ValueError(f"--train-state must go with a PREFIX, got {options.model}")
        writable(options.out, "OUT")
        model = open_model(options.model, average=wants_average(options)).model
        if ends[1]:
            export_safetensors(model, options.out)
        else:
            export_original(model, options.out, num_heads=options.num_heads, num_shards=options.shards)
        return 0
    if options.weights is not None:
        raise ValueError(f"--weights must go with a run or another file with both, got {options.model}")
    if ends[1]:
        convert(options.model, options.out, train_state=options.train_state, progress=sys.stderr.isatty())
    else:
        export_original(options.model, options.out, num_heads=options.num_heads, num_shards=options.shards)
    return 0
