"""Whether a file, or a compiled model, gives the logits of the model it was made of."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vmoe_torch.control import eval_mode, moe_layers
from vmoe_torch.extras import how_to_install

# Largest difference, relative to the largest logit: some hundred times the rounding of float32 over a model's depth.
TOLERANCE = 1e-4
# Where experts get bfloat16, as in the released models: another order of a sum moves a value by a step of 2**-8 now and
# then. A token that goes elsewhere shows much more.
BFLOAT16_TOLERANCE = 2**-9
# Rounding can tip a choice at the edge of a capacity, which shows in the logits; it does not do so draw after draw.
DRAWS = 3


def check_file(path: Path | str, model: nn.Module, shape: tuple[int, int, int, int]) -> float:
    """Runs a .pt2 file by torch, or an .onnx file by onnxruntime, on the CPU, and compares it with the model.

    Args:
        path: the file.
        model: what it was made of, routed as it was then.
        shape: (B, C, H, W) of the random images.

    Returns:
        The largest difference of a logit, relative to the largest one.

    Raises:
        ValueError: if they differ by more than rounding does (TOLERANCE, BFLOAT16_TOLERANCE) in each of DRAWS draws of
            images, or all logits are equal, so that nothing could be compared.
    """
    return compare_logits(str(path), _onnx(path) if Path(path).suffix == ".onnx" else _pt2(path), model, shape)


def check_compiled(model: nn.Module, shape: tuple[int, int, int, int]) -> float:
    """The same of `torch.compile(model, fullgraph=True)`; what that raises is not caught."""
    with eval_mode(model):
        return compare_logits("torch.compile", torch.compile(model, fullgraph=True), model, shape)


def _onnx(path: Path | str) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"ONNX needs {how_to_install('onnxruntime')}, got {error}") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])


def _pt2(path: Path | str) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


@torch.no_grad()
def compare_logits(name: str, other: Callable[[Tensor], Tensor], model: nn.Module, shape: tuple[int, ...]) -> float:
    rounded = any(layer.dispatch_dtype == torch.bfloat16 for layer in moe_layers(model).values())
    tolerance = BFLOAT16_TOLERANCE if rounded else TOLERANCE
    parameter = next(model.parameters())
    found = []
    with eval_mode(model):
        for draw in range(DRAWS):
            images = torch.randn(shape, generator=torch.Generator().manual_seed(draw)).to(parameter)
            want, got = model(images).cpu(), other(images).cpu()
            if want.numel() == 0 or want.min() == want.max():
                raise ValueError("model must give logits that differ, or nothing can be compared; is its head trained?")
            if got.shape != want.shape:
                raise ValueError(f"{name} must give logits {tuple(want.shape)}, got {tuple(got.shape)}")
            found.append(float((got - want).abs().max() / want.abs().max()))
            if found[-1] <= tolerance:
                return found[-1]
    raise ValueError(
        f"{name} must give the model's logits within {tolerance:g} of the largest one, "
        f"got differences of {', '.join(f'{each:.2g}' for each in found)}"
    )
