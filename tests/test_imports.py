"""Who may import whom: the house has one direction; and a name stands for one thing."""

import ast
import graphlib
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room imports, beside itself and third parties: only what stands above it. "vmoe_torch" is the package's own
# file, which registers the models.
MAY_IMPORT = {
    "vmoe_kernels": set(),
    "cores": set(),
    "extras": set(),
    "files": set(),
    "data": {"extras", "files"},
    "layers": {"vmoe_kernels"},
    "weights": {"files", "layers"},
    "models": {"vmoe_kernels", "layers", "weights"},
    "checkpoints": {"weights", "models"},
    "control": {"layers"},
    "hub": {"files", "layers", "models", "control"},
    "planning": {"vmoe_kernels", "layers"},
    "parallel": {"vmoe_kernels", "files", "layers", "weights", "planning"},
    "evaluate": {"vmoe_kernels", "files", "data", "layers", "control"},
    "budget": {"control", "evaluate"},
    "export": {"extras", "layers", "control", "evaluate"},
    "report": {"files", "data"},
    "analyze": {"files", "data", "layers", "control", "evaluate", "report"},
    "trainers": {"layers"},
    "train": {"vmoe_kernels", "cores", "files", "data", "layers", "weights", "models", "control", "parallel"}
    | {"evaluate", "report"},
    "recipes": {"train"},
    "vmoe_torch": {"cores", "layers", "models", "control", "hub", "budget"},
    "doctor": {"vmoe_kernels", "cores", "train", "vmoe_torch"},
    "commands": {"cores", "files", "data", "layers", "weights", "models", "control", "parallel", "evaluate", "budget"}
    | {"export", "analyze", "train", "recipes", "doctor", "vmoe_torch"},
    "cli": {"cores", "extras", "parallel", "commands", "vmoe_torch"},
    "demo": {"cores", "files", "data", "evaluate", "analyze", "train", "recipes"},
    "run": {"vmoe_torch"},
    "timm_train": {"vmoe_torch"},
}
# Lines of a file that needs no reason in its docstring.
LONG = 400


def _modules() -> dict[str, Path]:
    """The file of every module of ours, by its name."""
    found = {}
    for folder in ("src", "kernels", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder if folder in ("src", "kernels") else ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
PACKAGES = [name for name, path in MODULES.items() if path.name == "__init__.py" and not name.startswith("tests")]


def _room(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if first == "vmoe_torch" and rest else first


SHIPPED = {name: _room(name) for name in MODULES if name.startswith(("vmoe_torch", "vmoe_kernels"))}


def _nodes(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    """All nodes, those inside functions included, and those for type checkers if they are wanted."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and not typing_too and ast.unparse(node.test) == "TYPE_CHECKING":
            node = ast.Module(node.orelse, [])
        yield node
        yield from _nodes(node, typing_too)


def _imported(module: str, typing_too: bool = True) -> set[str]:
    """What a module imports: the file of ours where there is one, else what the statement says."""
    names = set()
    for node in _nodes(TREES[module], typing_too):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} must use absolute imports"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return names - {module}


def test_kernels_import_only_torch_and_triton():
    allowed = {"torch", "triton", "vmoe_kernels", *sys.stdlib_module_names}
    for module in SHIPPED:
        if module.startswith("vmoe_kernels"):
            roots = {name.partition(".")[0] for name in _imported(module)}
            assert roots <= allowed, f"{module} imports {roots - allowed}"


def test_every_room_stands_in_the_table():
    assert set(SHIPPED.values()) == set(MAY_IMPORT)
    above = set()
    for room, allowed in MAY_IMPORT.items():
        assert allowed <= above, f"{room} may import what stands below it: {allowed - above}"
        above.add(room)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_downwards_only(room):
    for module in (name for name, where in SHIPPED.items() if where == room):
        # What is no part of the package, tests and benchmarks, is imported by nobody in it.
        found = {_room(name) for name in _imported(module) if name in MODULES} - {room}
        assert found <= MAY_IMPORT[room], f"{module} must not import {found - MAY_IMPORT[room]}"


def test_files_import_each_other_in_no_circle():
    """Imports inside functions count, those for type checkers do not."""
    graph = {module: _imported(module, typing_too=False) & SHIPPED.keys() for module in SHIPPED}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_no_module_has_the_name_of_what_it_defines():
    for module, tree in TREES.items():
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert module.rpartition(".")[2] not in defined, module


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_gives_its_modules_by_their_names(package):
    """`import package.module` gives the module, and nothing else that is called so."""
    loaded = importlib.import_module(package)
    for module in (name for name in MODULES if name.rpartition(".")[0] == package):
        name = module.rpartition(".")[2]
        # One that is not loaded yet will be itself, unless the package would rather give something else then.
        if name in vars(loaded) or name in getattr(loaded, "__all__", ()):
            given = getattr(loaded, name)
            assert inspect.ismodule(given), f"{module} is {given!r}"
            assert given.__name__ == module, package


def test_nothing_private_is_imported_from_another_module():
    found = set()
    for module, tree in TREES.items():
        # Names that modules of ours have here.
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                if node.module.split(".")[0] in ("vmoe_torch", "vmoe_kernels", "benchmarks", "tests"):
                    found |= {(module, alias.name) for alias in node.names if _is_private(alias.name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                owner = ast.unparse(node.value)
                if modules.get(owner, owner) in MODULES:
                    found.add((module, node.attr))
    assert not found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


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


def test_a_long_file_says_why():
    for module, path in MODULES.items():
        # timm's own tests, as they are.
        if "timm_suite" not in path.parts and path.read_text(encoding="utf-8").count("\n") > LONG:
            said = ast.get_docstring(TREES[module]) or ""
            assert f"over {LONG} lines: " in said.lower(), f"{module} has more than {LONG} lines and does not say why"
