"""Runs a script with vmoe_torch imported, for scripts that create timm models but have no way to import a module.

    python -m vmoe_torch.run validate.py /data/imagenet --model vmoe_s32 ...

validate.py, benchmark.py, inference.py and onnx_export.py of timm are such scripts; train.py has --device-modules.
"""

import runpy
import sys
from pathlib import Path

import vmoe_torch  # noqa: F401  (registers the models)


def main(argv: list[str]) -> None:
    """Runs argv[0] as __main__ with sys.argv = argv and, as Python does, the script's folder first in sys.path.

    Args:
        argv: the script and its arguments.

    Raises:
        SystemExit: if no script is given or it is not a file; and whatever the script raises.
    """
    usage = "usage: python -m vmoe_torch.run SCRIPT [ARGS ...]"
    if not argv:
        raise SystemExit(f"{usage}\nSCRIPT must be given")
    script = Path(argv[0])
    if not script.is_file():
        raise SystemExit(f"{usage}\nSCRIPT must be an existing file, got {argv[0]!r}")
    sys.argv = list(argv)
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
