"""The trainings of the study: their names, their configurations, and what each is for.

Sizes, sweeps and seeds are stated here and nowhere else. The sweeps read the validation typefaces alone.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from pathlib import Path

import timm
import torch

import vmoe_torch
from benchmarks.studies.typefaces import routers
from vmoe_torch.evaluate import count_flops
from vmoe_torch.train import Config

SIDE = 32
CLASSES = 2965
BATCH = 128
# Whole groups of 8 images.
GROUP = 8
SEEDS = (0, 1, 2)
# Of the distortions' defaults: with all of them, small models learn nothing of so many classes for a thousand updates.
DISTORT = 0.5
# Updates in which the learning rate rises.
WARMUP = 200


@dataclass(frozen=True)
class Size:
    """A width and what it is trained for."""

    width: int
    """Of the tokens; a head has 32 channels where that divides it, else 16."""
    updates: int
    """Of the sparse model and of the dense one at equal epochs, of 128 images each."""
    patch: int = 8
    """Side of a patch in pixels: 16 tokens of an image, or 64 with half of it."""


SIZES = {"small": Size(96, 6000), "middle": Size(128, 4800), "large": Size(192, 3000)}
DENSE = {"moe_layers": ()}
# What the sweep on the validation typefaces chose.
SPARSE = {
    "moe_layers": "every2",
    "num_experts": 16,
    "num_selected_experts": 1,
    "capacity_factor": 1.05,
    "capacity_multiple_of": 1,
    "group_size": GROUP,
}
LR = {"dense": 2e-3, "sparse": 2e-3, "upcycled": 1e-3, "continued": 1e-3}
# Two gates that sum to 1, so that the model is at first the one it was made from.
UPCYCLED = {**SPARSE, "num_selected_experts": 2, "renormalize_gates": True}
# Where a dense model may be at its capacity: both kinds, for a few updates.
REGIME_UPDATES = 1600
REGIMES = {
    "96 wide, patch 8": Size(96, REGIME_UPDATES),
    "48 wide, patch 4": Size(48, REGIME_UPDATES, 4),
}
# The designs that were tried, at the middle size and for fewer updates; what they change in SPARSE and in the recipe.
SWEEP_UPDATES = 1600
SWEEP: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    **{f"dense, lr {lr:g}": ("dense", {}, (f"optim.lr={lr}",)) for lr in (1e-3, 2e-3, 5e-4, 4e-3)},
    **{f"sparse, lr {lr:g}": ("sparse", {}, (f"optim.lr={lr}",)) for lr in (1e-3, 2e-3, 5e-4, 4e-3)},
    "dense, queries and keys normalised": ("dense", {"qk_norm": True}, ()),
    "sparse, queries and keys normalised": ("sparse", {"qk_norm": True}, ()),
    "second half": ("sparse", {"moe_layers": (3, 4, 5)}, ()),
    "K = 2, renormalised": ("sparse", {"num_selected_experts": 2, "renormalize_gates": True}, ()),
    "32 experts": ("sparse", {"num_experts": 32}, ()),
    "last 2": ("sparse", {"moe_layers": "last2"}, ()),
    "every block": ("sparse", {"moe_layers": "every1"}, ()),
    "K = 2": ("sparse", {"num_selected_experts": 2}, ()),
    "expert dropout 0.1": ("sparse", {"expert_drop": 0.1}, ()),
    "drop path 0.1": ("sparse", {"drop_path_rate": 0.1}, ()),
    "dense, drop path 0.1": ("dense", {"drop_path_rate": 0.1}, ()),
    "larger groups": ("sparse", {"group_size": 32}, ()),
}


@dataclass(frozen=True)
class Run:
    """A training, or what is known before it."""

    name: str
    """Of its folder and in the results."""
    kind: str
    """"dense", "sparse", "continued" (a dense one) or "upcycled"; "dials" trains nothing, it turns those of `after`."""
    size: str
    """A key of SIZES or REGIMES."""
    seed: int
    """Of the weights, of the order of images and of their distortions."""
    updates: int
    """Of BATCH images."""
    changes: tuple[str, ...] = ()
    """Overrides of the recipe."""
    model: tuple[tuple[str, object], ...] = ()
    """Changes of the model's arguments."""
    after: str | None = None
    """The run whose last weights this one begins with."""
    tested: bool = True
    """Whether it may see the test typefaces: what chooses settings may not."""
    compared: bool = False
    """Whether it is of the comparison of routers, which asks less of a model than the others."""

    def config(self, folder: Path) -> Config:
        """The whole recipe; runs lie beside each other in a folder, which holds the fonts as well."""
        size = {**SIZES, **REGIMES}[self.size]
        arguments = {
            "img_size": SIDE,
            "patch_size": size.patch,
            "in_chans": 1,
            "embed_dim": size.width,
            "depth": 6,
            "num_heads": size.width // (32 if size.width % 32 == 0 else 16),
            "class_token": False,
            "global_pool": "avg",
            "pos_embed": "sincos2d",
            **(SPARSE if self.kind == "sparse" else DENSE),
            **dict(self.model),
        }
        model = {"name": "vmoe_s32", "kwargs": arguments}
        if self.after is not None:
            model["checkpoint"] = str(folder / self.after)
        if self.kind == "upcycled":
            model["upcycle"] = UPCYCLED
        config = Config.from_dict(
            {
                "model": {"name": "vmoe_s32", "kwargs": arguments},
                "data": {
                    "name": "typefaces",
                    "root": str(folder / "fonts"),
                    "batch_size": BATCH,
                    "eval_batch_size": 256,
                    "distort": DISTORT,
                },
                "optim": {"lr": LR[self.kind], "weight_decay": 0.05, "ema_decay": 0.998},
                "schedule": {"updates": self.updates, "warmup_updates": WARMUP},
                "run": {
                    "output": str(folder / self.name),
                    "seed": self.seed,
                    "device": "cpu",
                    "tensorboard": False,
                    "progress": False,
                    "summary": False,
                    "checkpoint_every": 400,
                    "log_every": 50,
                },
            }
        )
        return config.override(*self.changes)


def regimes() -> list[Run]:
    """Both kinds at every width and patch that was thought of; one seed."""
    return [
        Run(_name("regime", f"{kind}, {name}"), kind, name, 0, size.updates, tested=False)
        for name, size in REGIMES.items()
        for kind in ("sparse", "dense")
    ]


def _name(part: str, label: str) -> str:
    return f"{part}_" + "".join(c if c.isalnum() else "_" for c in label)


def sweep() -> list[Run]:
    """The trainings that choose; one seed, the middle size."""
    return [
        Run(
            _name("sweep", name),
            kind,
            "middle",
            0,
            SWEEP_UPDATES,
            changes,
            tuple(sorted(model.items())),
            tested=False,
        )
        for name, (kind, model, changes) in SWEEP.items()
    ]


def sizes() -> list[Run]:
    """Both kinds at every size for equal epochs, and the dense one for equal training FLOPs; the middle with seeds."""
    found = []
    for seed in SEEDS:
        for name, size in SIZES.items():
            if seed != SEEDS[0] and name != "middle":
                continue
            sparse = Run(f"sparse_{name}_{seed}", "sparse", name, seed, size.updates)
            dense = Run(f"dense_{name}_{seed}", "dense", name, seed, size.updates)
            updates = math.ceil(size.updates * forward_flops(sparse) / forward_flops(dense))
            found += [sparse, dense, Run(f"dense_flops_{name}_{seed}", "dense", name, seed, updates)]
    return found


def upcycling() -> list[Run]:
    """A trained dense model goes on, as it is or upcycled, for equal added FLOPs."""
    found = []
    for seed in SEEDS:
        before = f"dense_middle_{seed}"
        dense = Run(f"continued_{seed}", "continued", "middle", seed, SIZES["middle"].updates // 2, after=before)
        sparse = replace(dense, name=f"upcycled_{seed}", kind="upcycled")
        updates = math.floor(dense.updates * forward_flops(dense) / forward_flops(sparse))
        found += [replace(sparse, updates=updates), dense]
    return found


def comparison() -> list[tuple[str, Run]]:
    """Every router and layout with its label, at the middle size and for the training FLOPs of the sparse model there.

    What `sizes` trains anyway is not trained twice.
    """
    known = [run for run in sizes() if run.size == "middle"]
    budget = SIZES["middle"].updates * forward_flops(next(run for run in known if run.kind == "sparse"))
    usual = {**{name: each.default for name, each in signature(vmoe_torch.VMoE).parameters.items()}, **SPARSE}
    found = []
    for seed in SEEDS[:2]:
        for label, (kind, model) in routers.models(SPARSE["num_experts"]).items():
            changes = tuple(sorted((name, value) for name, value in model.items() if usual[name] != value))
            run = Run(_name("routers", f"{label} {seed}"), kind, "middle", seed, 0, model=changes, compared=True)
            run = replace(run, updates=math.ceil(budget / forward_flops(run)))
            same = (other for other in known if replace(other, name=run.name, compared=True) == run)
            found.append((label, next(same, run)))
    return found


def dials() -> list[Run]:
    """What is turned after the training, by K, by capacity and by threshold."""
    return [
        Run(f"dials_{run.name}", "dials", run.size, run.seed, 0, after=run.name)
        for label, run in comparison()
        if label in routers.DIALLED
    ]


PARTS = {
    "regimes": regimes,
    "sweep": sweep,
    "sizes": sizes,
    "upcycling": upcycling,
    "routers": lambda: [*(run for _, run in comparison()), *dials()],
}


def runs_of(parts: Sequence[str] = tuple(PARTS)) -> Iterator[Run]:
    """The runs of some parts, in order; what several of them need comes once."""
    yield from {run.name: run for part in parts for run in PARTS[part]()}.values()


def forward_flops(run: Run) -> float:
    """FLOPs per image of a forward at the capacity of the training."""
    arguments = run.config(Path("runs")).model.kwargs
    moe = UPCYCLED if run.kind == "upcycled" else {}
    return _forward_flops(tuple(sorted({**arguments, **moe}.items())))


@cache
def _forward_flops(arguments: tuple[tuple[str, object], ...]) -> float:
    model = timm.create_model("vmoe_s32", num_classes=CLASSES, **dict(arguments))
    return count_flops(model, torch.zeros(GROUP, 1, SIDE, SIDE)).total
