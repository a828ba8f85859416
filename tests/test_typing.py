"""What a type checker says of code that uses the packages: the examples of README and docs pass, mistakes are found.

The checker sees the packages as an editable install shows them: two paths in a .pth file of an environment.
"""

import importlib
import inspect
import json
import shutil
import site
import subprocess
import sys
from pathlib import Path
from typing import Unpack, get_args, get_type_hints

import pytest
from timm.models.vision_transformer import VisionTransformer

import vmoe_torch
from tests.test_docs import APART, PAGES, PUBLIC, blocks
from vmoe_torch.layers import MoeMlp, moe_mlp, options, settings
from vmoe_torch.models import ensemble
from vmoe_torch.models.options import VisionTransformerOptions, VMoEOptions

ROOT = Path(__file__).parents[1]
# Each line is wrong, and the only one of its file.
WRONG = {
    "routing_keyword": ("vmoe_torch.routing(model, batch_prio=True)", 'No parameter named "batch_prio"'),
    "routing_type": ("vmoe_torch.routing(model, num_selected_experts='2')", "num_selected_experts"),
    "routing_word": ("vmoe_torch.routing(model, priority='mean')", "priority"),
    "set_routing_keyword": ("vmoe_torch.set_routing(model, capacity=0.5)", 'No parameter named "capacity"'),
    "set_routing_word": ("vmoe_torch.set_routing(model, group_size='images')", "group_size"),
    "upcycle_keyword": ("vmoe_torch.upcycle(model, num_expert=8)", 'No parameter named "num_expert"'),
    "upcycle_word": ("vmoe_torch.upcycle(model, auxiliary_mode='auto')", "auxiliary_mode"),
    "set_budget_result": ("vmoe_torch.set_budget(model, flops=0.5, data=[]).undo()", "undo"),
    "set_budget_keyword": ("vmoe_torch.set_budget(model, flop=0.5, data=[])", 'No parameter named "flop"'),
    "vmoe_keyword": ("vmoe_torch.VMoE(num_expert=8)", 'No parameter named "num_expert"'),
    "vmoe_word": ("vmoe_torch.VMoE(router='top_k')", "router"),
    "ensemble_keyword": ("vmoe_torch.models.VMoEEnsemble(num_expert=8)", 'No parameter named "num_expert"'),
    "layer_word": ("vmoe_torch.layers.MoeMlp(8, dispatch_dtype='float16')", "dispatch_dtype"),
    "absent": ("vmoe_torch.load_balancing", "load_balancing"),
}
RIGHT = """
with vmoe_torch.routing(model, layers=["blocks.1.mlp"], eval_capacity_factor=None, group_size="batch", priority="sum"):
    pass
sparse = vmoe_torch.upcycle(model, (1, 3), 4, capacity_factor=2.0, group_size=4, renormalize_gates=True)
budget = vmoe_torch.set_budget(sparse, flops=0.5, data=[torch.zeros(2, 3, 32, 32)])
budget.revert(sparse)
own = vmoe_torch.VMoE(img_size=32, patch_size=8, embed_dim=32, num_heads=2, pos_embed="sincos2d", moe_layers="last2")
vmoe_torch.models.VMoEEnsemble(img_size=32, ensemble_size=2, num_experts=8, ensemble_output="members")
vmoe_torch.layers.MoeMlp(8, 16, act_layer="relu", device="cpu", dtype=torch.float32)
"""
HEAD = """\
import timm
import torch
import vmoe_torch
import vmoe_torch.layers
model = timm.create_model('test_vmoe')
"""


def _environment(folder: Path) -> Path:
    """A folder that a checker takes for a virtual environment with the packages in it."""
    packages = folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    paths = [ROOT / "src", ROOT / "kernels", *site.getsitepackages()]
    (packages / "paths.pth").write_text("".join(f"{path}\n" for path in paths))
    return folder


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, list[str]]:
    """{name of a file: its errors}, of one run over all examples and mistakes."""
    checker = shutil.which("basedpyright", path=f"{Path(sys.executable).parent}")
    if checker is None:
        pytest.skip("basedpyright is not installed: it is in the extra `dev`")
    folder = tmp_path_factory.mktemp("typed")
    environment = _environment(tmp_path_factory.mktemp("environments") / "venv")
    for page, path in PAGES.items():
        code = [block.code for block in blocks(path.read_text(encoding="utf-8")) if block.language == "python"]
        # Programs of their own, or one.
        parts = code if page in APART else ["\n".join(code)] if code else []
        for number, part in enumerate(parts):
            (folder / f"{_file_of(page)}-{number}.py").write_text(part, encoding="utf-8")
    for name, (line, _) in WRONG.items():
        (folder / f"{name}.py").write_text(f"{HEAD}{line}\n")
    (folder / "right.py").write_text(HEAD + RIGHT)
    configuration = {
        "typeCheckingMode": "basic",
        "venvPath": str(environment.parent),
        "venv": environment.name,
        "pythonVersion": "3.11",
        # What a page shows may be an expression.
        "reportUnusedExpression": False,
        # torch's own: the names are public, by its documentation, and not in its __all__.
        "reportPrivateImportUsage": False,
        # Other people's tools, where the extra `interop` is not installed; ours are found, or no mistake would be.
        "reportMissingImports": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(configuration))
    result = subprocess.run([checker, "-p", folder, "--outputjson"], capture_output=True, text=True)
    found = json.loads(result.stdout)
    files = list(folder.glob("*.py"))
    errors: dict[str, list[str]] = {path.stem.partition("-")[0]: [] for path in files}
    assert found["summary"]["filesAnalyzed"] == len(files)
    for each in found["generalDiagnostics"]:
        if each["severity"] == "error":
            line = each["range"]["start"]["line"] + 1
            errors[Path(each["file"]).stem.partition("-")[0]].append(f"line {line}: {each['message']}")
    return errors


def _file_of(page: str) -> str:
    return page.replace("/", "_").replace("-", "_").removesuffix(".md")


@pytest.mark.parametrize("page", [page for page, path in PAGES.items() if "```python" in path.read_text()])
def test_examples_are_typed(page, errors):
    assert errors[_file_of(page)] == []


def test_calls_as_they_are_meant_are_typed(errors):
    assert errors["right"] == []


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_found(name, errors):
    lines = HEAD.count("\n") + 1
    assert errors[name], f"{WRONG[name][0]} is taken"
    assert all(each.startswith(f"line {lines}:") for each in errors[name])
    assert any(WRONG[name][1] in each for each in errors[name]), errors[name]


def test_lazy_names_are_imported_for_type_checkers():
    source = Path(vmoe_torch.__file__).read_text()
    reading = source[source.index("if TYPE_CHECKING:") : source.index("else:")]
    lazy = [name for name in vmoe_torch.__all__ if name not in vars(vmoe_torch)]
    assert all(f"import {name}\n" in reading for name in lazy)
    for name in lazy:
        assert callable(getattr(vmoe_torch, name))


def test_words_of_the_types_are_those_of_the_checks():
    for kind, words in (
        (options.AuxiliaryMode, moe_mlp.AUXILIARY_MODES),
        (options.RouterType, moe_mlp.ROUTERS),
        (get_args(options.GroupSize)[1], tuple(settings.GROUP_SIZES)),
        (ensemble.EnsembleOutput, ensemble.OUTPUTS),
    ):
        assert get_args(kind) == words


def _parameters(of, *left_out: str) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(of).parameters.items()
        if name not in left_out and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def test_options_are_those_of_the_layer_and_of_timm():
    layer = _parameters(MoeMlp, "in_features", "hidden_features", "out_features", "act_layer", "norm_layer", "bias")
    passed_on = layer - {"drop", "num_experts", "renormalize_gates", "device", "dtype"}
    assert set(get_type_hints(options.ExpertOptions)) == passed_on
    assert get_type_hints(vmoe_torch.routing, include_extras=True)["changes"] == Unpack[options.RoutingOptions]
    own = _parameters(vmoe_torch.VMoE)
    timms = _parameters(VisionTransformer, "block_fn", "mlp_layer", "scale_mlp_norm")
    assert set(get_type_hints(VisionTransformerOptions)) == timms - own
    assert set(get_type_hints(VMoEOptions)) == (timms | own) - {"depth", "moe_layers"}


def test_set_routing_and_routing_take_the_same():
    signatures = [inspect.signature(each) for each in (vmoe_torch.set_routing, vmoe_torch.routing)]
    assert signatures[0].parameters == signatures[1].parameters


def test_public_functions_are_annotated():
    """Every parameter and result of what the packages export; a name without one is anything to a checker."""
    bare = []
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ["load_recipe", "recipe_names"]):
            public = getattr(module, name)
            function = public.__init__ if inspect.isclass(public) else public
            if not inspect.isfunction(function) or function.__module__.partition(".")[0] not in package:
                continue
            for parameter in inspect.signature(function).parameters.values():
                if parameter.annotation is parameter.empty and parameter.name != "self":
                    bare.append(f"{package}.{name}({parameter.name})")
            if not inspect.isclass(public) and inspect.signature(function).return_annotation is inspect.Signature.empty:
                bare.append(f"{package}.{name} -> ?")
    assert bare == []
