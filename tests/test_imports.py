"""Who may import whom: the house has one direction."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a room may import, beside itself and third parties. Data sets stand below everything.
MAY_IMPORT = {
    "layers": {"vmoe_kernels"},
    "models": {"vmoe_kernels", "layers", "weights"},
    "data": set(),
    "weights": {"layers", "models"},
    "parallel": {"vmoe_kernels", "layers", "planning"},
    "planning": {"vmoe_kernels", "layers"},
    "evaluate": {"vmoe_kernels", "layers", "models", "control", "data"},
    "budget": {"control", "evaluate"},
    "export": {"control", "evaluate"},
    "report": {"data"},
    "analyze": {"layers", "models", "control", "data", "evaluate", "report"},
    "train": {"layers", "models", "weights", "control", "cores", "data", "parallel", "evaluate", "report"},
    "recipes": {"train"},
    "trainers": {"layers"},
}


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must use absolute imports"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_kernels_import_only_torch_and_triton():
    allowed = {"torch", "triton", "vmoe_kernels", *sys.stdlib_module_names}
    for path in _files(ROOT / "kernels"):
        roots = {name.partition(".")[0] for name in _imported(path)}
        assert roots <= allowed, f"{path.name} imports {roots - allowed}"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_rooms_import_downwards_only(room):
    known = {"vmoe_kernels", *(path.stem for path in (ROOT / "src/vmoe_torch").iterdir())}
    for path in _files(ROOT / "src/vmoe_torch" / room):
        for name in _imported(path):
            parts = name.split(".")
            if parts[0] == "vmoe_torch":
                target = parts[1] if len(parts) > 1 else None
                # The package itself may be imported to register the models, from above them only.
                if target is None:
                    assert room not in ("layers", "models", "data"), f"{path.name} imports the whole package"
                    continue
            else:
                target = parts[0]
            if target in known and target != room:
                assert target in MAY_IMPORT[room], f"{room}/{path.name} must not import {target}"


def test_import_of_kernels_loads_no_model():
    code = "import sys, vmoe_kernels; print([m for m in ('timm', 'vmoe_torch', 'torchvision') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_import_of_models_loads_no_reader():
    code = (
        "import sys, vmoe_torch.models; print([m for m in sys.modules if m.startswith('vmoe_torch.weights.original')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_import_of_package_loads_no_training():
    others = (
        "matplotlib",
        "tensorboard",
        "vmoe_torch.trainers",
        "transformers",
        "accelerate",
        "lightning",
        "timm.task",
    )
    code = f"import sys, vmoe_torch; print([m for m in {others} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_files_stay_short():
    long = {}
    for folder in ("src", "kernels", "tests", "benchmarks"):
        for path in _files(ROOT / folder):
            lines = path.read_text().count("\n")
            if lines > 450 and "timm_suite" not in path.parts:
                long[path.name] = lines
    # models/vmoe.py lists every registered model, one function each, as timm wants it.
    assert set(long) <= {"vmoe.py"}, long
