"""A V-MoE beside timm's dense ViT of the same dims: K=1 at C=1 has the dense model's FLOPs, up to the router's.

Dims: B images, L tokens per image, E experts, K selected, C capacity factor.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
from torch import Tensor, nn

import vmoe_torch
from benchmarks.harness.protocol import require_close, with_gradients

# A group: the fewest images at which a model routes as it does in the benchmark.
CHECKED_IMAGES = 8
_SPARSE = {"num_selected_experts": 1, "capacity_factor": 1.0, "noise_std": 0.0, "num_classes": 1000}


@dataclass(frozen=True)
class Pair:
    """Names and arguments of both models, and images per batch."""

    moe: str
    dense: str
    images: int
    moe_options: dict = field(default_factory=dict)
    dense_options: dict = field(default_factory=dict)


PAIRS = {
    "cuda": Pair("vmoe_b16", "vit_base_patch16_224", 128),
    # The dense model's activation is the V-MoE's, and the capacity is not rounded up, so that FLOPs are equal. A CPU's
    # step reads and writes all experts' weights and gradients, 8 times a dense model's, however few images there are.
    "cpu": Pair(
        "vmoe_s32",
        "vit_small_patch32_224",
        64,
        {"num_experts": 8, "capacity_multiple_of": 1},
        {"embed_dim": 512, "depth": 8, "num_heads": 8, "act_layer": "gelu_tanh"},
    ),
}
TINY = Pair("test_vmoe", "test_vit", 8)


def make_models(pair: Pair, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Tensor]:
    """Both models by name, and (B, 3, H, W) images.

    "ours, nothing dropped" has the weights of "ours" and room for every choice. A fresh router is uneven: at C=1 some
    tokens find no slot, and a CPU spends nothing on the slots that stay empty. Only that one does all of the dense
    model's work there; on a GPU the slots of "ours" do.
    """
    torch.manual_seed(0)
    ours = timm.create_model(pair.moe, **_SPARSE, **pair.moe_options)
    dense = timm.create_model(pair.dense, num_classes=1000, **pair.dense_options)
    for model in (ours, dense):
        # A fresh head of ours is zero, which would hide whatever is wrong before it.
        nn.init.normal_(model.head.weight, std=0.02)
    size = dense.pretrained_cfg["input_size"][-1]
    x = torch.randn(pair.images, 3, size, size, device=device, dtype=dtype)
    models = {"ours": ours, "dense": dense}
    if device.type == "cpu":
        models["ours, nothing dropped"] = copy.deepcopy(ours)
        roomy = max(layer.num_experts for layer in vmoe_torch.moe_layers(ours).values())
        vmoe_torch.set_routing(models["ours, nothing dropped"], capacity_factor=float(roomy))
    return {name: model.to(device, dtype) for name, model in models.items()}, x


@torch.inference_mode()
def kept_share(model: nn.Module, x: Tensor) -> float:
    """Share of the choices that find a slot in a forward in eval mode, over all layers."""
    model.eval()(x)
    slots = torch.stack([layer.record.slots for layer in vmoe_torch.moe_layers(model).values()])
    return (slots >= 0).float().mean().item()


def check_models(models: dict[str, nn.Module], x: Tensor) -> None:
    """Every V-MoE agrees with itself on the eager reference: logits and gradients of images and parameters.

    Raises:
        RuntimeError: naming what is more than twice as far from float64 as the eager reference is.
    """
    x = x[:CHECKED_IMAGES]
    for name, model in models.items():
        if vmoe_torch.moe_layers(model):
            got, eager = (_results(model, x, impl) for impl in ("auto", "reference"))
            exact = _results(copy.deepcopy(model).double(), x.double(), "reference")
            try:
                require_close(got, eager, exact)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from error


def _results(model: nn.Module, x: Tensor, impl: str) -> dict[str, Tensor]:
    """Logits and gradients in training mode; those of parameters that differ in their block's number are one vector."""
    layers = vmoe_torch.moe_layers(model).values()
    for layer in layers:
        layer.impl = impl
    inputs = {"images": x.detach().requires_grad_(), **dict(model.train().named_parameters())}
    cotangent = torch.randn(len(x), model.num_classes, generator=torch.Generator().manual_seed(1)).to(x)
    try:
        results = with_gradients(lambda: model(inputs["images"]), inputs, cotangent)
    finally:
        for layer in layers:
            layer.impl = "auto"
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in results.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(tensor.flatten())
    return {kind: torch.cat(tensors) for kind, tensors in kinds.items()}


@torch.no_grad()
def check_compiled(compiled: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    """A compiled model gives the eager one's logits.

    Raises:
        RuntimeError: if it is more than twice as far from float64 as the eager model is.
    """
    exact = copy.deepcopy(model).double()(x.double())
    require_close({"logits": compiled(x)}, {"logits": model(x)}, {"logits": exact})
