"""The report on a model whose tokens choose nothing: expert choice, which says how many experts a token had, and soft
layers, which say what their slots are mixtures of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vmoe_torch.analyze.patches import different_classes, pictures_of
from vmoe_torch.analyze.share_figures import chosen_slots, experts_that_took, patch_shares
from vmoe_torch.analyze.shares import (
    ExpertsPerToken,
    Mixtures,
    collect_shares,
    layers_without_choices,
    shares_of_patches,
)
from vmoe_torch.analyze.statistics import patch_grid
from vmoe_torch.evaluate import Evaluation, as_rows, evaluate, write_csv
from vmoe_torch.files import write_json
from vmoe_torch.report import Figure, Report, Section, Table, write_report
from vmoe_torch.report.style import flops_unit, layer_label, percent

# Slots of a soft layer, or layers of expert choice, that are drawn.
MOST_ROWS = 6


@dataclass(frozen=True)
class ShareAnalysis:
    """What was found out about a model whose tokens choose nothing."""

    routing: str
    """The model's own, in words."""
    own: Evaluation
    """Accuracy with it."""
    layers: dict[str, ExpertsPerToken | Mixtures]
    """{layer name: what it did}."""
    pictures: Tensor
    """(B, H, W) or (B, H, W, 3) images in 0..1, as the model sees them; of clips a frame in the middle."""
    picture_names: tuple[str, ...]
    """(B,) class of each image."""
    patches: dict[str, Tensor]
    """{layer name: what it did with the patches of the images}, of `shares_of_patches`; of clips in the middle."""
    slots_per_expert: dict[str, int]
    """{name of a soft layer: P}."""
    dense: Evaluation | None = None
    """A model to compare with, on the same images."""
    dense_name: str = "the dense model"
    """What to call it."""
    of_clips: bool = False
    """Whether the images are of clips."""

    def with_dense(self, dense: Evaluation, name: str) -> "ShareAnalysis":
        """The same with a model to compare with, evaluated on the same images."""
        return replace(self, dense=dense, dense_name=name)

    def report(self, title: str, about: Sequence[Section] = (), after: Sequence[Section] = ()) -> Report:
        """The report, its own sections between others."""
        parts = [self._accuracy(), self._experts(), self._mixtures()]
        words = [f"{self.own.images:,} images; {self.routing}. Top-1 {percent(self.own.top1)}."]
        return Report(title, words, [*about, *(part for part in parts if part is not None), *after])

    def write(self, out: Path | str, title: str = "What the experts do", about: Sequence[Section] = ()) -> Path:
        """Writes report.html with its figures beside it, report.json with every number, and results.csv.

        Args:
            out: the folder; made if it is missing.
            title: of the page.
            about: sections to begin with.

        Returns:
            The path of the page.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        write_json("report", out / "report.json", self.as_dict())
        write_csv([self.own], out / "results.csv")
        links = {
            "results.csv: accuracy and compute": "results.csv",
            "report.json: every number of this page": "report.json",
        }
        return write_report(self.report(title, about, [Section("Files", links=links)]), out)

    def as_dict(self) -> dict:
        """Plain values for JSON; shares are in 0..1, FLOPs per image."""
        layers = {}
        for name, found in self.layers.items():
            if isinstance(found, Mixtures):
                parts = {"tokens_of_a_slot": found.tokens_of_a_slot, "slots_of_a_token": found.slots_of_a_token}
                layers[name] = {part: {**asdict(spread), "mean": spread.mean} for part, spread in parts.items()}
            else:
                layers[name] = {
                    "experts_per_token": {"min": found.lowest, "mean": found.mean, "max": found.highest},
                    "tokens_by_experts": found.counts.tolist(),
                }
        return {
            "images": self.own.images,
            "routing": self.routing,
            "own": as_rows([self.own])[0],
            "dense": None if self.dense is None else {"name": self.dense_name, **as_rows([self.dense])[0]},
            "layers": layers,
        }

    def _accuracy(self) -> Section:
        kinds = {"this model": self.own} | ({} if self.dense is None else {self.dense_name: self.dense})
        scale, unit = flops_unit(max(each.flops.total for each in kinds.values()))
        rows = [
            (
                name,
                f"{100 * each.top1:.2f}",
                f"{100 * each.top5:.2f}",
                f"{each.loss:.3f}",
                f"{each.flops.total / scale:.2f}",
            )
            for name, each in kinds.items()
        ]
        return Section(
            "How accurate it is",
            paragraphs=["Capacity, K and the order of service are nothing to vary here: there is one setting."],
            table=Table(("model", "top-1 %", "top-5 %", "loss", f"{unit} per image"), rows),
        )

    def _experts(self) -> Section | None:
        layers = {name: found for name, found in self.layers.items() if isinstance(found, ExpertsPerToken)}
        if not layers:
            return None
        rows = [
            (
                layer_label(name),
                str(found.lowest),
                f"{found.mean:.2f}",
                str(found.highest),
                f"{100 * (1 - found.at_least(1)):.1f}",
                f"{100 * found.at_least(2):.1f}",
            )
            for name, found in layers.items()
        ]
        most = max(layers, key=lambda name: layers[name].highest)
        drawn = list(layers)[-MOST_ROWS:]
        return Section(
            "How many experts each token gets",
            paragraphs=["Every expert takes its best tokens of a group, so a token may have none, one, or many."],
            table=Table(("layer", "fewest", "mean", "most", "without expert %", "two or more %"), rows),
            figures=[
                Figure(
                    "experts_per_token",
                    experts_that_took(layers),
                    f"How tokens share the experts. In {layer_label(most)} one token has {layers[most].highest}.",
                    "Bar charts of the tokens by the number of experts that took them, for each layer",
                ),
                Figure(
                    "experts_per_patch",
                    patch_shares(
                        self.pictures,
                        [(layer_label(name), self.patches[name]) for name in drawn],
                        self.picture_names,
                        f"Which patches the experts take{self._moment}",
                    ),
                    "The more experts take a patch, the more of it is to be seen; pale blue patches have none.",
                    "Grid of images whose patches are the paler the fewer experts took them, by layer",
                ),
            ],
            wide=True,
        )

    def _mixtures(self) -> Section | None:
        layers = {name: found for name, found in self.layers.items() if isinstance(found, Mixtures)}
        if not layers:
            return None
        rows = [
            (layer_label(name), *(text for spread in _spreads(found) for text in _three(spread)))
            for name, found in layers.items()
        ]
        last = list(layers)[-1]
        slots = chosen_slots(self.patches[last], MOST_ROWS)
        return Section(
            "What slots and tokens are mixtures of",
            paragraphs=[
                "Every slot is a mixture of all tokens of an image, every token gets a mixture of what all slots give. "
                "In effective numbers (the exponential of the entropy): k equal shares count as k."
            ],
            table=Table(
                ("layer", "tokens of a slot: fewest", "mean", "most", "slots of a token: fewest", "mean", "most"), rows
            ),
            figures=[
                Figure(
                    "slots",
                    patch_shares(
                        self.pictures,
                        [(self._slot(last, slot), self.patches[last][:, slot]) for slot in slots],
                        self.picture_names,
                        f"Which patches a slot draws from{self._moment}: {layer_label(last)}",
                    ),
                    f"The slots of {layer_label(last)} that draw from the fewest patches. A patch is to be seen as far "
                    "as its share in the slot reaches the largest one.",
                    "Grid of images whose patches are the paler the less a slot takes of them, by slot",
                )
            ],
            wide=True,
        )

    @property
    def _moment(self) -> str:
        return " in the middle of clips" if self.of_clips else ""

    def _slot(self, layer: str, slot: int) -> str:
        expert, place = divmod(slot, self.slots_per_expert[layer])
        return f"expert {expert}" if self.slots_per_expert[layer] == 1 else f"expert {expert},\nslot {place}"


def _spreads(found: Mixtures) -> tuple:
    return found.tokens_of_a_slot, found.slots_of_a_token


def _three(spread) -> tuple[str, str, str]:
    return f"{spread.lowest:.1f}", f"{spread.mean:.1f}", f"{spread.highest:.1f}"


def analyze_shares(
    model: nn.Module,
    dataset: Dataset,
    loader: DataLoader,
    transform: Callable,
    class_names: Sequence[str],
    *,
    pictures: int = 8,
    progress: Callable[[str], Callable[[Iterable], Iterable]] = lambda text: iter,
) -> ShareAnalysis:
    """Runs the analyses of a model whose tokens choose nothing, reading the images twice; the model stays as it is.

    Args:
        model: a VMoE with layers of expert choice or soft ones, on any device.
        dataset: items (PIL image, label), or (`Video`, label).
        loader: of the same images as tensors, with their labels.
        transform: for evaluation, PIL image -> (C, H, W), or `Video` -> (C, T, H, W).
        class_names: by label.
        pictures: images to draw.
        progress: makes, of a text, what wraps a loader.

    Raises:
        ValueError: if there is no image.
    """
    chosen = different_classes(dataset, transform, pictures)
    tensors = torch.stack([image for image, _ in chosen])
    found = collect_shares(model, loader, progress=progress("looking at the routers"))
    (own,) = evaluate(model, loader, progress=progress("evaluating"))
    layers = layers_without_choices(model)
    seen, patches = pictures_of(tensors, transform), shares_of_patches(model, tensors)
    if of_clips := tensors.ndim == 5:
        times = patch_grid(model, tensors)[0]
        seen = seen[:, times // 2 * tensors.shape[2] // times]
        patches = {name: shares.select(-3, times // 2) for name, shares in patches.items()}
    return ShareAnalysis(
        describe_shares(model),
        own,
        found,
        seen,
        tuple(class_names[label] for _, label in chosen),
        patches,
        {name: layer.own_router().slots_per_expert for name, layer in layers.items() if layer.router_type == "soft"},
        of_clips=of_clips,
    )


def describe_shares(model: nn.Module) -> str:
    """The routing of a model's layers without choices: "soft, 128 experts of 1 slot", with "or" where they differ."""
    texts = []
    for layer in layers_without_choices(model).values():
        slots = layer.own_router().slots_per_expert
        if slots is None:
            texts.append(f"expert choice, {layer.num_experts} experts, C={layer.eval_capacity_factor:g}")
        else:
            texts.append(f"soft, {layer.num_experts} experts of {slots} slot{'s' if slots > 1 else ''}")
    return " or ".join(dict.fromkeys(texts))
