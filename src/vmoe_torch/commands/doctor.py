"""`vmoe doctor`: whether all is well on this machine, and what to do where it is not."""

import argparse

from vmoe_torch.commands import options as opt
from vmoe_torch.doctor.examination import Examination, examine
from vmoe_torch.doctor.machine import device_or_reason
from vmoe_torch.doctor.text import describe
from vmoe_torch.files import write_json


def add(commands) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine, first of all",
        description="Versions, devices and process groups; every op on the device against plain PyTorch, forward and "
        "gradients, in each dtype; the speed of a layer; and what to do where something is not well. The exit code is "
        "0 only if all is well.",
        epilog="example: vmoe doctor --device cuda:0 --json doctor.json",
    )
    opt.add_device(parser)
    opt.add_number(parser, "--seconds", 0, 60, "seconds for measuring speed, 0 for none")
    parser.add_argument("--json", metavar="FILE", help="write all that was found, with tracebacks, for a report")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    opt.writable(options.json, "--json")
    device = device_or_reason(options.device)

    def write(found: Examination) -> None:
        if options.json is not None:
            write_json("report", options.json, found.as_dict())

    found = examine(device, options.seconds, opt.progress, write)
    print(describe(found))
    if options.json is not None:
        print(f"\n{options.json}: all of this, with the tracebacks of errors")
    elif found.problems:
        print("\nFor a report: vmoe doctor --json doctor.json writes all of this, with the tracebacks of errors")
    return 0 if found.healthy else 1
