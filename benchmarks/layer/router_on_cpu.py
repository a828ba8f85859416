"""The router's share of a small model's training step on a CPU, where routing costs most: width 128."""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.entries import Entry
from benchmarks.harness.protocol import measure, one_update, relative_error
from benchmarks.harness.results import Row, row
from vmoe_torch import auxiliary_loss, moe_layers
from vmoe_torch.recipes import load_recipe

LIMIT = 0.05
WIDTH, HEADS, IMAGES = 128, 4, 64
CPU = torch.device("cpu")


def make_model(width: int) -> nn.Module:
    """The demo's model, wider: experts in every block, noise and auxiliary losses as in training."""
    torch.manual_seed(0)
    model = load_recipe("fashion_mnist").model
    options = {**model.kwargs, "embed_dim": width, "num_heads": HEADS, "num_classes": 10}
    return timm.create_model(model.name, **options).train()


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """With the auxiliary losses, by AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return one_update(lambda: F.cross_entropy(model(images), labels).add(auxiliary_loss(model)), optimizer)


def routers_alone(model: nn.Module, images: Tensor) -> Callable[[], dict[str, Tensor]]:
    """All routers on the tokens they have in the model: noise, gates, slots and losses, and their gradients."""
    calls = []
    for name, layer in moe_layers(model).items():
        tokens = _tokens(model, layer, images)
        groups = layer.groups(len(tokens), len(tokens) // len(images))
        calls.append((name, layer, tokens.requires_grad_(), groups))
    seed = torch.tensor(7)

    def call() -> dict[str, Tensor]:
        found = {}
        for name, layer, tokens, groups in calls:
            weight = layer.router.weight
            tokens.grad = weight.grad = None
            routed = layer.router(tokens, groups, seed)
            # The losses' gradients come in with those of the gates, as in training.
            routed.gates.backward(torch.ones_like(routed.gates))
            kinds = ("gates", "slots", "d_tokens", "d_weight")
            results = (routed.gates, routed.slots, tokens.grad, weight.grad)
            found |= {f"{name}.{kind}": result.detach() for kind, result in zip(kinds, results)}
        return found

    return call


def _tokens(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """(T, D) that a layer has in a forward."""
    seen = []
    with layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        model(images)
    return seen[0].flatten(0, -2).clone()


def check(model: nn.Module, alone: Callable[[], dict[str, Tensor]]) -> None:
    """The routers agree with the eager reference: slots, gates and gradients.

    Raises:
        RuntimeError: naming the first that does not; nothing is timed then.
    """
    got = alone()
    for layer in moe_layers(model).values():
        layer.impl = "reference"
    want = alone()
    for layer in moe_layers(model).values():
        layer.impl = "auto"
    for name, tensor in got.items():
        error = relative_error(tensor, want[name])
        if not error <= 1e-5:
            raise RuntimeError(f"{name} must be within 1e-5 of the eager reference, got {error:.1e}: nothing is timed")


def run(seconds: float) -> tuple[list[Entry], list[Row]]:
    """Checks, then times the whole step and the routers alone in turn."""
    # Two of them: gradients that are there already would look like accumulation to the routers.
    model, other = make_model(WIDTH), make_model(WIDTH)
    images, labels = torch.randn(IMAGES, 1, 28, 28), torch.arange(IMAGES) % 10
    alone = routers_alone(other, images)
    check(other, alone)
    samples = measure({"step": training_step(model, images, labels), "routers alone": alone}, CPU, seconds)
    layers = moe_layers(model)
    experts = next(iter(layers.values())).num_experts
    case = f"D={WIDTH} B={IMAGES} {len(layers)} layers of E={experts}"
    rows = [row("router", "both", case, name, each) for name, each in samples.items()]
    share = samples["routers alone"].over(samples["step"])
    return [Entry.of(f"the routers' share of a training step, {case}", LIMIT, share)], rows
