"""The trainings of the study: their names, their configurations, and what each is for.

Sizes, sweeps and seeds are stated here and nowhere else. The sweeps read the validation typefaces alone.
"""

import json
import math
import zlib
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
from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import Config

# The sparse model of the middle size.
RECIPE = load_recipe("typefaces")
SIDE = 32
CLASSES = 2965
BATCH = 128
SEEDS = (0, 1, 2)
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


SIZES = {"small": Size(48, 3200), "middle": Size(64, 3200), "large": Size(96, 3200)}
# V-MoEs alone, for what the quality of the smallest dense model costs.
SPARSE_SIZES = {"tiny": Size(32, 3200), "little": Size(40, 3200), **SIZES}
# Updates of the sparse model where training is no longer early; the comparison of routers is for their FLOPs.
TWICE = 2 * SIZES["middle"].updates
DENSE = {"moe_layers": ()}
# What the search on the validation typefaces chose.
SPARSE = {
    name: RECIPE.model.kwargs[name]
    for name in (
        "moe_layers",
        "num_experts",
        "num_selected_experts",
        "renormalize_gates",
        "expert_hidden",
        "capacity_factor",
        "group_size",
    )
}
# Experts as wide as the MLP, and two gates that sum to 1: upcycled so, a model is at first the one it was made from.
WHOLE_PAIRS = {**routers.WHOLE, "num_selected_experts": 2, "renormalize_gates": True}
# Updates of a trained dense model that goes on.
ADDED = SIZES["middle"].updates // 2
TRIED = Size(64, 1600)
# The search: each with its kind, its size, what it changes in SPARSE and what in the recipe.
SEARCH: dict[str, tuple[str, Size, dict, tuple[str, ...]]] = {
    "lr 6e-3": ("dense", TRIED, {}, ()),
    "lr 6e-3, as chosen": ("sparse", TRIED, {}, ()),
    "lr 1.2e-2": ("dense", TRIED, {}, ("optim.lr=1.2e-2",)),
    "lr 1.2e-2, else as chosen": ("sparse", TRIED, {}, ("optim.lr=1.2e-2",)),
    "16 experts, K=1": ("sparse", TRIED, {**routers.WHOLE, "num_selected_experts": 1}, ()),
    "in the second half": ("sparse", TRIED, {"moe_layers": (3, 4, 5)}, ()),
    "capacity 1.05": ("sparse", TRIED, {"capacity_factor": 1.05, "capacity_multiple_of": 1}, ()),
    "experts drop 10 % of their hidden units": ("sparse", TRIED, {"expert_drop": 0.1}, ()),
    "10 % of paths dropped": ("sparse", TRIED, {"drop_path_rate": 0.1}, ()),
    "goes on, lr 6e-3": ("continued", TRIED, {}, ()),
    "goes on, lr 3e-3": ("continued", TRIED, {}, ("optim.lr=3e-3",)),
    "lr 6e-3, to 32 half as wide": ("upcycled", TRIED, {}, ()),
    "lr 3e-3, to 32 half as wide": ("upcycled", TRIED, {}, ("optim.lr=3e-3",)),
    "lr 6e-3, to 16 as wide": ("upcycled", TRIED, WHOLE_PAIRS, ()),
    "lr 3e-3, to 16 as wide": ("upcycled", TRIED, WHOLE_PAIRS, ("optim.lr=3e-3",)),
    "lr 3e-3, to 16 as wide in the last block": (
        "upcycled",
        TRIED,
        {**WHOLE_PAIRS, "moe_layers": (5,)},
        ("optim.lr=3e-3",),
    ),
    "lr 3e-3": ("dense", TRIED, {}, ("optim.lr=3e-3",)),
    "lr 3e-3, else as chosen": ("sparse", TRIED, {}, ("optim.lr=3e-3",)),
    "in the last 2": ("sparse", TRIED, {"moe_layers": "last2"}, ()),
    "16 experts of half the width": ("sparse", TRIED, {"num_experts": 16, "expert_hidden": (0.5,) * 16}, ()),
}


@dataclass(frozen=True)
class Run:
    """A training, or what is known before it."""

    name: str
    """Of its folder and in the results."""
    kind: str
    """"dense", "sparse", "continued" (a dense one) or "upcycled"; "dials" trains nothing, it turns those of `after`."""
    size: str
    """A key of SPARSE_SIZES, or of SEARCH."""
    seed: int
    """Of the weights, of the order of images and of their distortions."""
    updates: int
    """Of BATCH images."""
    changes: tuple[str, ...] = ()
    """Overrides of the recipe."""
    model: tuple[tuple[str, object], ...] = ()
    """Changes of the model's arguments, or of what it is upcycled to."""
    after: "Run | None" = None
    """The run whose last weights this one begins with."""
    tested: bool = True
    """Whether it may see the test typefaces: what chooses settings may not."""
    compared: bool = False
    """Whether it is only compared with others of its part, which asks less of a model than the sizes do."""

    def config(self, folder: Path) -> Config:
        """The whole recipe; runs lie beside each other in a folder, which holds the fonts as well."""
        size = SPARSE_SIZES[self.size] if self.size in SPARSE_SIZES else SEARCH[self.size][1]
        arguments = {
            **{name: value for name, value in RECIPE.model.kwargs.items() if name not in SPARSE},
            "patch_size": size.patch,
            "embed_dim": size.width,
            "num_heads": size.width // (32 if size.width % 32 == 0 else 16),
            **(SPARSE if self.kind == "sparse" else DENSE),
            **({} if self.kind == "upcycled" else dict(self.model)),
        }
        model = {"name": RECIPE.model.name, "kwargs": arguments}
        if self.after is not None:
            model["checkpoint"] = str(folder / self.after.name)
        if self.kind == "upcycled":
            model["upcycle"] = {**SPARSE, **dict(self.model)}
        told = RECIPE.to_dict()
        config = Config.from_dict(
            {
                "model": model,
                "data": {**told["data"], "root": str(folder / "fonts"), "batch_size": BATCH},
                "optim": told["optim"],
                "schedule": {**told["schedule"], "updates": self.updates, "warmup_updates": WARMUP},
                "run": {
                    **told["run"],
                    "output": str(folder / self.name),
                    "seed": self.seed,
                    "device": "cpu",
                    "tensorboard": False,
                    "progress": False,
                    "summary": False,
                },
            }
        )
        return config.override(*self.changes)

    def fingerprint(self) -> str:
        """Of all that decides what the run finds: its result stands for another run's of the same fingerprint."""
        told = [self.kind, self.after and self.after.fingerprint()]
        if self.kind != "dials":
            config = self.config(Path("runs")).to_dict()
            told += [config[part] for part in ("model", "data", "optim", "schedule")] + [self.seed]
        return f"{zlib.crc32(json.dumps(told, sort_keys=True).encode()):08x}"


def _name(part: str, label: str) -> str:
    return f"{part}_" + "".join(c if c.isalnum() else "_" for c in label)


def search() -> list[Run]:
    """The trainings that choose; one seed. Those that begin with a dense model all add as many FLOPs to its."""
    before = next(run for run in sizes() if run.name == f"dense_middle_{SEEDS[0]}")
    found = []
    for label, (kind, size, model, changes) in SEARCH.items():
        name, own = _name("search", f"{kind} {size.width} {label}"), tuple(sorted(model.items()))
        run = Run(name, kind, label, SEEDS[0], size.updates, changes, own, tested=False)
        if kind in ("upcycled", "continued"):
            run = replace(run, after=before)
            run = replace(run, updates=math.floor(ADDED * forward_flops(before) / forward_flops(run)))
        found.append(run)
    return found


def sizes() -> list[Run]:
    """Both kinds at every size for equal epochs, and the dense one for equal training FLOPs; the middle with seeds.

    And the V-MoEs of sizes that have no dense one, and the middle size for twice as many updates with two seeds, both
    kinds for equal training FLOPs.
    """
    found = []
    for seed in SEEDS:
        some = {name: size for name, size in SIZES.items() if seed == SEEDS[0] or name == "middle"}
        equal_epochs = []
        # What takes longest comes first, that no core is idle in the end.
        for name, size in reversed(some.items()):
            sparse = Run(f"sparse_{name}_{seed}", "sparse", name, seed, size.updates)
            dense = Run(f"dense_{name}_{seed}", "dense", name, seed, size.updates)
            updates = math.ceil(size.updates * forward_flops(sparse) / forward_flops(dense))
            found += [sparse, Run(f"dense_flops_{name}_{seed}", "dense", name, seed, updates)]
            equal_epochs.append(dense)
        found += equal_epochs
        if seed in SEEDS[:2]:
            sparse = Run(f"sparse_twice_middle_{seed}", "sparse", "middle", seed, TWICE, compared=True)
            dense = replace(sparse, name=f"dense_twice_middle_{seed}", kind="dense")
            updates = math.ceil(TWICE * forward_flops(sparse) / forward_flops(dense))
            found += [sparse, replace(dense, updates=updates)]
        if seed == SEEDS[0]:
            own = {name: size for name, size in SPARSE_SIZES.items() if name not in SIZES}
            found += [Run(f"sparse_{name}_{seed}", "sparse", name, seed, size.updates) for name, size in own.items()]
    return found


def upcycling() -> list[Run]:
    """A trained dense model goes on, as it is or upcycled, for equal added FLOPs."""
    found = []
    for seed in SEEDS:
        before = next(run for run in sizes() if run.name == f"dense_middle_{seed}")
        dense = Run(f"continued_{seed}", "continued", "middle", seed, ADDED, after=before, compared=True)
        sparse = replace(dense, name=f"upcycled_{seed}", kind="upcycled")
        updates = math.floor(dense.updates * forward_flops(dense) / forward_flops(sparse))
        found += [replace(sparse, updates=updates), dense]
    return found


def comparison() -> list[tuple[str, Run]]:
    """Every router and layout with its label, at the middle size, for the training FLOPs of TWICE of the sparse model.

    What `sizes` trains anyway is not trained again.
    """
    known = [run for run in sizes() if run.size == "middle"]
    budget = TWICE * forward_flops(next(run for run in known if run.kind == "sparse"))
    usual = {**{name: each.default for name, each in signature(vmoe_torch.VMoE).parameters.items()}, **SPARSE}
    found = []
    for seed in SEEDS[:2]:
        for label, (kind, model) in routers.models().items():
            changes = tuple(sorted((name, value) for name, value in model.items() if usual[name] != value))
            run = Run(_name("routers", f"{label} {seed}"), kind, "middle", seed, 0, model=changes, compared=True)
            run = replace(run, updates=math.ceil(budget / forward_flops(run)))
            same = (other for other in known if replace(other, name=run.name, compared=True) == run)
            found.append((label, next(same, run)))
    return found


def dials() -> list[Run]:
    """What is turned after the training, of the first seed: by K, by capacity and by threshold."""
    return [
        Run(f"dials_{run.name}", "dials", run.size, run.seed, 0, after=run)
        for label, run in comparison()
        if label in routers.DIALLED and run.seed == SEEDS[0]
    ]


PARTS = {
    "search": search,
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
    moe = {**SPARSE, **dict(run.model)} if run.kind == "upcycled" else {}
    return _forward_flops(tuple(sorted({**arguments, **moe}.items())))


@cache
def _forward_flops(arguments: tuple[tuple[str, object], ...]) -> float:
    model = timm.create_model("vmoe_s32", num_classes=CLASSES, **dict(arguments))
    return count_flops(model, torch.zeros(BATCH, 1, SIDE, SIDE)).total
