"""`vmoe convert`: the original's checkpoints to safetensors, and back."""

import argparse
import sys

import timm

from vmoe_torch.commands.options import add_weights, keep, wants_average, writable
from vmoe_torch.commands.sources import open_model
from vmoe_torch.parallel import export_safetensors
from vmoe_torch.train.rules import count
from vmoe_torch.weights.conversion import convert
from vmoe_torch.weights.exporting import export_original
from vmoe_torch.weights.remote import suffix_of
from vmoe_torch.weights.sources import is_prefix, is_weights


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints of the original JAX V-MoE, and back",
        description="Converts PREFIX.index and PREFIX.data-nnnnn-of-NNNNN to one .safetensors file, or such one back. "
        "Every other MODEL of the other commands, as a run or an .npz, becomes either. A SOURCE may be a URL. The "
        "routing that was chosen travels.",
        epilog="example: vmoe convert gs://vmoe_checkpoints/vmoe_s32_last2_ilsvrc2012_randaug_light1 s32.safetensors",
    )
    parser.add_argument("source", metavar="SOURCE", help="PREFIX, FILE.safetensors or other MODEL to read")
    parser.add_argument("target", metavar="TARGET", help="FILE.safetensors or PREFIX to write")
    parser.add_argument("--train-state", action="store_true", help="keep optimizer, step and random keys too")
    parser.add_argument("--num-heads", type=int, metavar="N", help="attention heads, for a file that does not say it")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="data files to write (default: 1)")
    keep(parser, count(1), "--num-heads")
    keep(parser, count(1), "--shards")
    add_weights(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from_file, to_file = (suffix_of(name) == ".safetensors" for name in (options.source, options.target))
    from_prefix = is_prefix(options.source)
    known = is_weights(options.source) or timm.is_model(options.source)
    if to_file if from_file else not to_file and (from_prefix or not known):
        raise ValueError(f"one of the two names must end in .safetensors, got {options.source} and {options.target}")
    if not from_file and not from_prefix:
        if options.train_state and known:
            raise ValueError(f"--train-state must go with a PREFIX, got {options.source}")
        writable(options.target, "TARGET")
        model = open_model(options.source, average=wants_average(options)).model
        if to_file:
            export_safetensors(model, options.target)
        else:
            export_original(model, options.target, num_heads=options.num_heads, num_shards=options.shards)
        return 0
    if options.weights is not None:
        raise ValueError(f"--weights must go with a run or another file with both, got {options.source}")
    if to_file:
        convert(options.source, options.target, train_state=options.train_state, progress=sys.stderr.isatty())
    else:
        export_original(options.source, options.target, num_heads=options.num_heads, num_shards=options.shards)
    return 0
