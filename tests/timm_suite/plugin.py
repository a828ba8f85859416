"""Pytest plugin: timm's own tests/test_models.py, unmodified, on our models and with no exemption for them.

timm's test file asks `timm.list_models` which models each test gets. This plugin, loaded before that file, imports
vmoe_torch and answers in timm's place: where a list of name patterns says `vit_*` it reads as if it also said `vmoe_*`,
`test_vit*` as if also `test_vmoe*`, and where a list of modules says `vision_transformer` also `vmoe` and `video`, so
each of our models is held to what a ViT is held to; and of the answer only our models are kept. Tests of other models
by name go.

So that loading is tested without a network, the tiny models get a file of random weights in the folder named by
VMOE_TIMM_WEIGHTS.

What a test needs decides who runs it:
- default_cfgs works on the meta device: every model.
- The pruning contract copies the model per block: models whose parameters, times the copies, are at most LIMIT.
- Reference outputs on timm's hub (test_model_inference) exist for no model of ours.
- Loading the released weights needs the network: tests/weights does it from a server on loopback.
- Every other test holds weights and gradients in float32, 8 bytes a parameter, and may hold a traced copy: models of
  at most LIMIT parameters, which is 4 GiB of weights and gradients, safe on a machine of 24 GB and done in minutes.
Parameters are counted on the meta device. Who ran and who was left out, and why, is printed at the end.
"""

import dataclasses
import os
import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import timm
import timm.models
import torch
from safetensors.torch import save_file

import vmoe_torch  # noqa: F401  (registers the models)
from vmoe_torch.models import video, vmoe

LIMIT = 4 * 1024**3 // 8
ON_META = ("test_model_default_cfgs_non_std",)
NEEDS_HUB = ("test_model_inference",)
LOADS = ("test_model_load_pretrained", "test_model_features_pretrained")
COPY_PER_BLOCK = ("test_prune_intermediate_layers_contract",)
SAME_PATTERNS = {"vit_*": ["vmoe_*"], "test_vit*": ["test_vmoe*"]}
MODULES = ["vmoe", "video"]
SAME_MODULES = {"vision_transformer": MODULES}

_timm_list_models = timm.list_models


def _with_ours(words, ours: dict[str, list[str]]) -> list[str]:
    words = list(filter(None, [words] if isinstance(words, str) else words))
    return words + [own for word in words for own in ours.get(word, ())]


def list_our_models(
    filter="",
    module="",
    pretrained=False,
    exclude_filters="",
    name_matches_cfg=False,
    include_tags=None,
) -> list[str]:
    """timm.list_models, where our models count as ViTs and no other model exists."""
    names = _timm_list_models(
        _with_ours(filter, SAME_PATTERNS),
        _with_ours(module, SAME_MODULES),
        pretrained=pretrained,
        exclude_filters=_with_ours(exclude_filters, SAME_PATTERNS),
        name_matches_cfg=name_matches_cfg,
        include_tags=include_tags,
    )
    return [name for name in names if timm.models.is_model_in_modules(name, MODULES)]


@cache
def size(name: str) -> tuple[int, int]:
    """Parameters and blocks of a model."""
    model = timm.create_model(name, device="meta")
    return sum(parameter.numel() for parameter in model.parameters()), len(model.blocks)


def reason_to_leave_out(test: str, name: str) -> str | None:
    """Why a model does not run a test, by the rule of the module's docstring."""
    if test in ON_META:
        return None
    if test in NEEDS_HUB:
        return "compares with tensors on timm's hub, which has none for our models"
    if test in LOADS and timm.get_pretrained_cfg(name).url:
        return "its weights are in a public bucket, which this suite does not reach"
    parameters, blocks = size(name)
    held = parameters * (blocks + 1) if test in COPY_PER_BLOCK else parameters
    if held <= LIMIT:
        return None
    what = f"{parameters:,} parameters"
    if test in COPY_PER_BLOCK:
        what += f" in {blocks + 1} copies"
    return f"{what}, above {LIMIT:,}"


def _give_weights(folder: Path) -> None:
    """Tiny models get a pretrained tag that names a local file, through timm's own registration."""
    for name in (name for module in MODULES for name in _timm_list_models("test_vmoe*", module=module)):
        home = video if name in video.default_cfgs else vmoe
        path = folder / f"{name}.safetensors"
        save_file(timm.create_model(name).state_dict(), path)
        cfgs = {f"{name}.{tag}": cfg for tag, cfg in home.default_cfgs[name].cfgs.items()}
        cfgs[f"{name}.random"] = dataclasses.replace(cfgs[f"{name}.untrained"], file=str(path))
        home.default_cfgs.update(timm.models.generate_default_cfgs(cfgs))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f"Overwriting {name} in registry")
            timm.models.register_model(getattr(home, name))


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)
    _give_weights(Path(os.environ["VMOE_TIMM_WEIGHTS"]))
    # The test file takes the function from here.
    timm.list_models = list_our_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, others = [], []
    config.stash[_LEFT_OUT] = left_out = defaultdict(dict)
    for item in items:
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        ours = isinstance(name, str) and timm.models.is_model_in_modules(name, MODULES)
        reason = reason_to_leave_out(item.originalname, name) if ours else None
        if reason is not None:
            left_out[item.originalname][name] = reason
        (kept if ours and reason is None else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


_LEFT_OUT = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """One line per test and model left out, so that nothing is left out in silence."""
    ran: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            test, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
            ran[test][outcome].append(parameters.rstrip("]"))
    terminalreporter.section("our models in timm's suite")
    left_out = config.stash[_LEFT_OUT]
    for test in sorted(ran.keys() | left_out.keys()):
        counts = ", ".join(f"{len(names)} {outcome}" for outcome, names in ran[test].items())
        terminalreporter.line(f"{test}: {counts or '0 ran'}, {len(left_out[test])} left out")
        for outcome, names in ran[test].items():
            terminalreporter.line(f"    {outcome}: {' '.join(names)}")
    terminalreporter.line("left out:")
    tests_of: dict[tuple[str, str], list[str]] = defaultdict(list)
    for test, reasons in left_out.items():
        for name, reason in reasons.items():
            tests_of[name, reason].append(test)
    for (name, reason), tests in tests_of.items():
        terminalreporter.line(f"    {name}: {reason}: {' '.join(tests)}")
