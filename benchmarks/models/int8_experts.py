"""Int8 experts against the same model in float32 and bfloat16 on a CPU: size, memory, images a second, agreement.

    python -m benchmarks.models.int8_experts [--run FOLDER] [--seconds 5] [--batches 1 8] [--threads 2]

Models have random weights: what they say of accuracy is how far their logits, and their first classes, are from the
float32 model's on random images. A run of `vmoe train` on Fashion-MNIST, such as the demo's, is held to its test images
as well. Variants of a model run in turn; "layer" is what a forward holds beside the weights while it computes one MoE
layer, its weights in floating point. Writes benchmarks/results/<machine>/models_int8_experts.{json,md}.
"""

import copy
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import vmoe_torch
from benchmarks.harness.protocol import measure
from benchmarks.harness.results import command_line, environment, heading, machine_name, publish
from vmoe_torch.commands.sources import open_model
from vmoe_torch.data import FashionMnist
from vmoe_torch.layers import MoeMlp
from vmoe_torch.layers.int8_experts import int8_layers, weight_count
from vmoe_torch.parallel import export_safetensors

MODELS = ("vmoe_s32", "vmoe_b16_e8")
# Name to what is made of the float32 model.
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float32, int8 experts": vmoe_torch.quantize_experts,
    "bfloat16, int8 experts": lambda model: vmoe_torch.quantize_experts(model).to(torch.bfloat16),
}
FLOAT = "float32"
# Images of Fashion-MNIST in a batch: a multiple of the demo's groups.
_BATCH = 200


def random_model(name: str) -> nn.Module:
    """In eval mode; its head, which begins at 0, is random too."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    nn.init.normal_(model.head.weight, std=0.02)
    return model


def variants_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every variant of a float32 model."""
    return {name: make(copy.deepcopy(model)) for name, make in VARIANTS.items()}


def sizes(model: nn.Module) -> dict[str, float]:
    """MB of the file and of the weights in memory, and what one MoE layer's int8 weights take while it computes."""
    with tempfile.TemporaryDirectory() as folder:
        export_safetensors(model, Path(folder) / "x.safetensors")
        file = (Path(folder) / "x.safetensors").stat().st_size
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    layers = [
        sum(linear.weight.numel() * linear.weight_scale.itemsize for linear in int8_layers(layer).values())
        for layer in model.modules()
        if isinstance(layer, MoeMlp)
    ]
    return {"file_mb": file / 1e6, "weights_mb": weights / 1e6, "layer_mb": max(layers) / 1e6}


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """In float32."""
    return model(images.to(next(model.parameters()).dtype)).float()


def compare(name: str, batches: list[int], seconds: float) -> dict:
    """One model: what each variant takes, how fast it is, and how far from float32."""
    models = variants_of(random_model(name))
    images = torch.randn(max(batches), 3, *models[FLOAT].patch_embed.img_size)
    want = logits_of(models[FLOAT], images)
    found = {variant: sizes(model) for variant, model in models.items()}
    for variant, model in models.items():
        got = logits_of(model, images)
        found[variant] |= {
            "logit_difference": ((got - want).abs().max() / want.abs().max()).item(),
            "same_class": (got.argmax(1) == want.argmax(1)).float().mean().item(),
            "images_per_second": {},
        }
    for batch in batches:
        calls = {variant: partial(logits_of, model, images[:batch]) for variant, model in models.items()}
        for variant, samples in measure(calls, torch.device("cpu"), seconds, min_runs=3).items():
            rates = [batch / samples.quantile(q) for q in (0.5, 0.8, 0.2)]
            found[variant]["images_per_second"][str(batch)] = [*rates, len(samples.seconds)]
    experts = sum(layer.weight.numel() for layer in int8_layers(models["float32, int8 experts"]).values())
    parameters = weight_count(models[FLOAT])
    return {"model": name, "parameters": parameters, "experts_share": experts / parameters, "variants": found}


def accuracy(run: Path) -> dict:
    """Accuracy of every variant of a run on the test images of Fashion-MNIST."""
    source, data = open_model(run), FashionMnist("test")
    images = torch.stack([source.transform(data[index][0]) for index in range(len(data))])
    labels = torch.tensor([int(data[index][1]) for index in range(len(data))])
    found = {}
    for variant, model in variants_of(source.model).items():
        logits = torch.cat([logits_of(model, part) for part in images.split(_BATCH)])
        top1 = (logits.argmax(1) == labels).float().mean().item()
        loss = nn.functional.cross_entropy(logits, labels).item()
        found[variant] = {"top1": top1, "loss": loss, **sizes(model)}
    return {"images": len(data), "variants": found}


def markdown(content: dict) -> list[str]:
    """The results file."""
    lines = heading("Int8 experts on a CPU", content["environment"])
    lines += [f"The machine's load was {content['load_before']:.2f} before. Rates are medians, with the 20% and 80%"]
    lines += ["quantiles. Difference: the largest of a logit, of the largest logit, on random images and weights."]
    for each in content["models"]:
        batches = list(each["variants"][FLOAT]["images_per_second"])
        lines += ["", f"## {each['model']}", ""]
        lines += [f"{each['parameters'] / 1e6:.1f} M parameters, {each['experts_share']:.0%} of them experts'.", ""]
        head = ["variant", "file MB", "weights MB", "layer MB", *(f"images/s, batch {batch}" for batch in batches)]
        lines += [f"| {' | '.join([*head, 'difference', 'same class'])} |", f"|{' --- |' * (len(head) + 2)}"]
        for variant, found in each["variants"].items():
            cells = [f"{found[key]:.1f}" for key in ("file_mb", "weights_mb", "layer_mb")]
            for median, low, high, runs in found["images_per_second"].values():
                cells.append(f"{median:.2f} ({low:.2f}..{high:.2f}, {runs} runs)")
            cells += [f"{found['logit_difference']:.4f}", f"{found['same_class']:.0%}"]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
    if content["run"] is not None:
        lines += ["", f"## A trained model, on {content['run']['images']:,} test images of Fashion-MNIST", ""]
        lines += ["| variant | file MB | accuracy | loss |", "| --- | --- | --- | --- |"]
        for variant, found in content["run"]["variants"].items():
            lines.append(f"| {variant} | {found['file_mb']:.3f} | {found['top1']:.2%} | {found['loss']:.5f} |")
    return lines


def main(arguments: list[str] | None = None) -> Path:
    """Writes the results; returns the path of the Markdown."""
    parser = command_line(__doc__, threads=2)
    parser.add_argument("--run", type=Path, help="a run of vmoe train on Fashion-MNIST, as the demo's runs/demo/train")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm's names (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images in a batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each model and batch (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    content = {
        "environment": environment(cpu),
        "load_before": os.getloadavg()[0],
        "models": [compare(name, options.batches, options.seconds) for name in options.models],
        "run": None if options.run is None else accuracy(options.run),
    }
    return publish(options.out / machine_name(cpu), "models_int8_experts", content, markdown)


if __name__ == "__main__":
    main()
