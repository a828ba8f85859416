"""The analyses of the V-MoE paper (arXiv 2106.05974, section 5 and appendix) for any trained V-MoE, as one report."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from vmoe_torch.analyze import accuracy_sections, routing_sections
from vmoe_torch.analyze.ablation import Ablation, ablate_routers
from vmoe_torch.analyze.clips import clip_section
from vmoe_torch.analyze.numbers import PatchExperts, collect_patch_experts, number_section
from vmoe_torch.analyze.patches import KeptPatches, collect_kept_patches
from vmoe_torch.analyze.share_report import ShareAnalysis, analyze_shares
from vmoe_torch.analyze.shares import layers_without_choices
from vmoe_torch.analyze.statistics import LayerRouting, collect_routing, routed_layers
from vmoe_torch.control import capacity_text, moe_layers
from vmoe_torch.data import evaluation_loader
from vmoe_torch.data.clips import frames_of_a_tubelet
from vmoe_torch.evaluate import Evaluation, RoutingSetting, as_rows, evaluate, setting_grid, write_csv
from vmoe_torch.files import write_json
from vmoe_torch.layers import MoeMlp
from vmoe_torch.layers.int8_experts import weight_count
from vmoe_torch.report import Report, Section, write_report

CAPACITY_FACTORS = (1.0, 0.5, 0.25, 0.1)
# Those of the animation, beside the ones asked for.
_FRAMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


@dataclass(frozen=True)
class Analysis:
    """What was found out about a model."""

    class_names: tuple[str, ...]
    """Names of the classes, by label."""
    routing: str
    """The model's own, in words."""
    selected_experts: int | None
    """Its own number of experts per token; None if its layers differ."""
    own: Evaluation
    """Accuracy with it."""
    evaluations: list[Evaluation]
    """Accuracy at every number of experts, capacity and order of a grid."""
    selected: list[Evaluation]
    """Accuracy with other numbers of experts per token, capacity and order as its own; none for layers that have
    thresholds and differ in their number of experts."""
    ablations: list[Ablation]
    """Accuracy with random routers."""
    routings: dict[str, LayerRouting]
    """{layer name: counts}."""
    patches: KeptPatches
    """What was kept of a few images."""
    capacity_factors: tuple[float, ...]
    """Capacity factors of the grid."""
    dense: Evaluation | None = None
    """A model to compare with, on the same images."""
    dense_name: str = "the dense model"
    """What to call it."""
    patch_experts: PatchExperts | None = None
    """How many experts each patch of a few images got, where a threshold decides; else None."""

    def with_dense(self, dense: Evaluation, name: str) -> "Analysis":
        """The same with a model to compare with, evaluated on the same images."""
        return replace(self, dense=dense, dense_name=name)

    def report(self, title: str, about: Sequence[Section] = (), after: Sequence[Section] = ()) -> Report:
        """The report, its own sections between others: what was trained or analysed, and what else there is to read."""
        patch_section = clip_section if self.patches.of_clips else routing_sections.patch_section
        parts = [
            accuracy_sections.accuracy_section(self.evaluations, self.dense, self.dense_name),
            number_section(self.routings, self.patch_experts),
            patch_section(self.patches, self.capacity_factors),
            routing_sections.load_section(self.routings),
            routing_sections.class_section(self.routings, self.class_names),
            routing_sections.position_section(self.routings),
            accuracy_sections.change_section(
                self.ablations, self.selected, self.selected_experts, len(self.class_names)
            ),
        ]
        words = accuracy_sections.summary(self.own, self.evaluations, self.dense, self.dense_name, self.routing)
        return Report(title, words, [*about, *(part for part in parts if part is not None), *after])

    def write(
        self,
        out: Path | str,
        title: str = "What the experts do",
        about: Sequence[Section] = (),
        files: dict[str, str] | None = None,
    ) -> Path:
        """Writes report.html with its figures beside it, report.json with every number, and results.csv with the grid.

        Args:
            out: the folder; made if it is missing.
            title: of the page.
            about: sections to begin with.
            files: {text: path in the folder} of other files to name.

        Returns:
            The path of the page.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        write_json("report", out / "report.json", self.as_dict())
        write_csv(self.evaluations, out / "results.csv")
        links = {
            "results.csv: accuracy and compute at every setting": "results.csv",
            "report.json: every number of this page, and the counts behind the figures": "report.json",
        }
        after = Section("Files", links={**links, **(files or {})})
        return write_report(self.report(title, about, [after]), out)

    def as_dict(self) -> dict:
        """Plain values for JSON; shares are in 0..1, FLOPs per image."""
        return {
            "images": self.own.images,
            "class_names": list(self.class_names),
            "routing": self.routing,
            "own": as_rows([self.own])[0],
            "grid": as_rows(self.evaluations),
            "experts_per_token": as_rows(self.selected),
            "dense": None if self.dense is None else {"name": self.dense_name, **as_rows([self.dense])[0]},
            "random_routers": [
                {"layers": list(a.layers), "images": a.images, "top1": a.top1, "loss": a.loss} for a in self.ablations
            ],
            "layers": {name: _layer_dict(routing) for name, routing in self.routings.items()},
            "kept_patches": {
                "class_names": list(self.patches.class_names),
                "capacity_factors": list(self.patches.capacity_factors),
                "group_images": self.patches.group_images,
                # Of every image: by layer, capacity and order.
                "share": {
                    name: {
                        order: [
                            self.patches.shares(name, capacity, priority) for capacity in self.patches.capacity_factors
                        ]
                        for priority, order in ((False, "vanilla"), (True, "bpr"))
                    }
                    for name in self.patches.kept
                },
            },
        }


def _layer_dict(routing: LayerRouting) -> dict:
    quantiles = (0.1, 0.25, 0.5, 0.75, 0.9)
    return {
        "tokens": routing.tokens,
        "capacity_factor": routing.capacity_factor,
        "dropped": routing.dropped,
        "unprocessed": routing.unprocessed / max(routing.tokens, 1),
        "load": routing.load.tolist(),
        # Tokens by the number of experts that processed them, from none to K.
        "experts_per_token": None if routing.numbers is None else routing.numbers.tolist(),
        "demand": routing.demand.tolist(),
        "gate_quantiles": dict(zip(map(str, quantiles), routing.gate_quantiles(*quantiles).T.tolist())),
        "gate_histograms": routing.gates.tolist(),
        # By class and expert.
        "wanted": routing.wanted.tolist(),
        "kept": routing.kept.tolist(),
        "class_dependence": routing.class_dependence.tolist(),
        # By row, column and expert.
        "positions": None if routing.positions is None else routing.positions.tolist(),
        "position_dependence": None if routing.positions is None else routing.position_dependence,
    }


def analyze(
    model: nn.Module,
    dataset: Dataset,
    transform: Callable,
    class_names: Sequence[str] | None = None,
    *,
    capacity_factors: Sequence[float] = CAPACITY_FACTORS,
    num_selected_experts: Sequence[int] | None = None,
    pictures: int = 8,
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 0,
    max_broken: int = 0,
    warn: Callable[[str], None] = lambda message: None,
    progress: Callable[[str], Callable[[Iterable], Iterable]] = lambda text: iter,
) -> Analysis | ShareAnalysis:
    """Runs every analysis on a model, reading the images three times and keeping none; the model stays as it is.

    A model whose tokens choose nothing (expert choice, soft) has analyses of its own, and no grid of settings.

    Args:
        model: a VMoE, on any device.
        dataset: items (PIL image, label), in an order that mixes the classes: see `sample`.
        transform: for evaluation, PIL image -> (C, H, W).
        class_names: by label; None numbers them.
        capacity_factors: of the grid.
        num_selected_experts: numbers of experts per token of the grid; None is the model's own, and 1.
        pictures: images to draw kept patches on.
        seed: of the random routers.
        batch_size: images per forward, best a multiple of the images of a group.
        workers: processes that read images.
        max_broken: images that cannot be read and are left out.
        warn: told of each of them.
        progress: makes, of a text, what wraps a loader, e.g. a `tqdm`.

    Raises:
        ValueError: if the model has no MoE layer or one that cannot be counted, there is no image, more images than
            `max_broken` cannot be read, a label is not among the model's classes, or a setting does not suit the model.
    """
    shared = layers_without_choices(model)
    layers = {} if shared else routed_layers(model)
    if shared and (num_selected_experts is not None or tuple(capacity_factors) != CAPACITY_FACTORS):
        kinds = " and ".join(dict.fromkeys(layer.router_type for layer in shared.values()))
        raise ValueError(f"capacity_factors and num_selected_experts must be left out for a model of {kinds}")
    for capacity in capacity_factors:
        if isinstance(capacity, str):
            raise ValueError(f"capacity_factors must be numbers, which have a place on an axis, got {capacity!r}")
    if class_names is None:
        class_names = tuple(map(str, range(model.num_classes)))
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, got none")
    pin = next(model.parameters()).device.type == "cuda"
    loader = evaluation_loader(dataset, transform, batch_size, workers, pin, max_broken=max_broken, option="max_broken")
    loader.warn = warn
    if shared:
        return analyze_shares(model, dataset, loader, transform, class_names, pictures=pictures, progress=progress)
    counts = {layer.num_selected_experts for layer in layers.values()}
    trained = counts.pop() if len(counts) == 1 else None
    most = min(layer.num_experts for layer in layers.values())
    by_threshold = any(layer.gate_threshold is not None or layer.mean_selected_experts for layer in layers.values())
    number_maps = by_threshold and frames_of_a_tubelet(model) == 1
    # A mean is for the number of experts that it was chosen for.
    own_and_fewer = (trained,) if by_threshold else (trained, 1)
    selected = own_and_fewer if num_selected_experts is None else num_selected_experts
    grid = setting_grid(capacity_factors, dict.fromkeys(selected))
    largest = trained or max(layer.num_selected_experts for layer in layers.values())
    tried = {largest} if by_threshold else {1, 2, 4, 8, trained or 1}
    others = [RoutingSetting(num_selected_experts=k) for k in sorted(tried) if k <= most]

    # First what tells soonest that something does not fit together.
    patches = collect_kept_patches(
        model, dataset, transform, class_names, {*capacity_factors, *_FRAMES}, count=pictures
    )
    routings = collect_routing(model, loader, len(class_names), progress=progress("looking at the routers"))
    settings = [RoutingSetting(), *others, *grid]
    evaluations = evaluate(model, loader, settings, progress=progress(f"evaluating {len(settings)} settings"))
    ablations = ablate_routers(model, loader, seed=seed, progress=progress("replacing routers"))
    return Analysis(
        tuple(class_names),
        describe_routing(model),
        trained,
        evaluations[0],
        evaluations[1 + len(others) :],
        evaluations[1 : 1 + len(others)],
        ablations,
        routings,
        patches,
        tuple(capacity_factors),
        patch_experts=collect_patch_experts(model, dataset, transform, class_names, pictures) if number_maps else None,
    )


def describe_model(model: nn.Module) -> str:
    """What a VMoE is made of, in words."""
    layers = list(moe_layers(model).values())
    experts = " or ".join(dict.fromkeys(str(layer.num_experts) for layer in layers))
    height, width = model.patch_embed.patch_size[-2:]
    frames = frames_of_a_tubelet(model)
    return (
        f"{len(model.blocks)} blocks of width {model.embed_dim}; {len(layers)} layers of {experts} experts; "
        f"patches of {f'{frames} x ' * (frames > 1)}{height} x {width} pixels; {weight_count(model):,} parameters"
    )


def describe_routing(model: nn.Module) -> str:
    """The routing of a model's layers in eval mode: "K=2, C=1.05, vanilla", with "or" where they differ."""
    layers = routed_layers(model).values()
    return ", ".join(
        " or ".join(dict.fromkeys(values))
        for values in (
            [f"K={layer.num_selected_experts}" for layer in layers],
            [f"C={capacity_text(layer.eval_capacity_factor)}" for layer in layers],
            ["BPR" if layer.batch_priority else "vanilla" for layer in layers],
            [words for words in map(_threshold_words, layers) if words],
        )
        if values
    )


def _threshold_words(layer: MoeMlp) -> str:
    """What a threshold does in eval mode: "1.4 experts per token", "gates from 0.2 on"; "" without one."""
    router = layer.own_router()
    if router.capacity_mean is not None:
        return f"{router.capacity_mean:g} experts per token"
    return f"gates from {layer.gate_threshold:g} on" if layer.gate_threshold else ""
