"""`vmoe convert`: the original's checkpoints to safetensors, and back."""

import argparse
import sys

import timm

from vmoe_torch.commands.options import add_number, add_option, add_weights, wants_average, writable
from vmoe_torch.commands.sources import open_model
from vmoe_torch.layers.int8_experts import quantize_experts
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
        "Every other MODEL of the other commands, as a run or an .npz, becomes either. A MODEL may be a URL. The "
        "routing that was chosen travels.",
        epilog="example: vmoe convert gs://vmoe_checkpoints/vmoe_s32_last2_ilsvrc2012_randaug_light1 s32.safetensors",
    )
    parser.add_argument("model", metavar="MODEL", help="PREFIX, FILE.safetensors or other MODEL to read")
    parser.add_argument("out", metavar="OUT", help="FILE.safetensors or PREFIX to write")
    text = "int8: write the experts' weights as 8-bit steps, for inference; OUT is FILE.safetensors, MODEL may be one"
    parser.add_argument("--experts", choices=["int8"], help=text)
    parser.add_argument("--train-state", action="store_true", help="keep optimizer, step and random keys too")
    text = "attention heads, for a file that does not say it"
    add_option(parser, "--num-heads", count(1), type=int, metavar="N", help=text)
    add_number(parser, "--shards", 1, 1, "data files to write")
    add_weights(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from_file, to_file = (suffix_of(name) == ".safetensors" for name in (options.model, options.out))
    from_prefix = is_prefix(options.model)
    if options.experts is not None:
        return _quantised(options, to_file)
    known = is_weights(options.model) or timm.is_model(options.model)
    if to_file if from_file else not to_file and (from_prefix or not known):
        raise ValueError(f"one of the two names must end in .safetensors, got {options.model} and {options.out}")
    if not from_file and not from_prefix:
        if options.train_state and known:
            raise ValueError(f"--train-state must go with a PREFIX, got {options.model}")
        writable(options.out, "OUT")
        model = open_model(options.model, average=wants_average(options)).model
        if to_file:
            export_safetensors(model, options.out)
        else:
            export_original(model, options.out, num_heads=options.num_heads, num_shards=options.shards)
        return 0
    if options.weights is not None:
        raise ValueError(f"--weights must go with a run or another file with both, got {options.model}")
    if to_file:
        convert(options.model, options.out, train_state=options.train_state, progress=sys.stderr.isatty())
    else:
        export_original(options.model, options.out, num_heads=options.num_heads, num_shards=options.shards)
    return 0


def _quantised(options: argparse.Namespace, to_file: bool) -> int:
    if not to_file:
        raise ValueError(f"OUT must end in .safetensors for --experts {options.experts}, got {options.out}")
    if options.train_state:
        raise ValueError(f"--train-state must not go with --experts {options.experts}, whose weights are not trained")
    writable(options.out, "OUT")
    model = quantize_experts(open_model(options.model, average=wants_average(options)).model)
    export_safetensors(model, options.out)
    return 0
