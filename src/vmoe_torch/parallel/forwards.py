"""What stands around every forward of a parallelised model: ranks compare what they are about to do, the thresholds
that they found become alike, and the auxiliary losses of the "manual" mode are tied to the model's output."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vmoe_torch.layers.of_model import moe_layers
from vmoe_torch.parallel.averages import average_thresholds
from vmoe_torch.parallel.mesh import group_timeout
from vmoe_torch.parallel.ranks.agreement import begin_same

# The exchange's splits are equal, and gradients are averaged over ranks.
RULE = "must be the same on all ranks in every forward"
_SETTINGS = ("capacity_rounding", "capacity_multiple_of", "noise_std", "router_type", "dispatch_dtype")


def routing_settings(model: nn.Module) -> dict[str, Any]:
    """Settings of all MoE layers by qualified name."""
    found = {}
    for name, layer in moe_layers(model).items():
        settings = {**layer.routing(), **{setting: getattr(layer, setting) for setting in _SETTINGS}}
        found |= {f"{name}.{setting}": value for setting, value in settings.items()}
    return found


class Forwards:
    """Hooks of a model that is to be parallelised; every rank must run its forwards together.

    Ranks compare the shape of the images, the mode and the routing once per forward, in one collective of 64 bytes: on
    CPU before anything else, on a GPU by a group of its own while the forward is launched, so that no host waits before
    it has given the GPU its work. A ValueError on all ranks names what differs.

    Args:
        model: whose hooks these become.
        device_type: of the mesh.
    """

    def __init__(self, model: nn.Module, device_type: str):
        self.at_once = device_type == "cpu"
        self.group = None if self.at_once else dist.new_group(backend="gloo", timeout=group_timeout())
        self.end: Callable[[], None] = lambda: None
        model.register_forward_pre_hook(self.before)
        model.register_forward_hook(self.after)

    def __deepcopy__(self, memo) -> "Forwards":
        # A process group cannot be copied.
        return self

    @torch.compiler.disable
    def before(self, model: nn.Module, inputs: tuple) -> None:
        """Compares, or begins to."""
        images = next((value for value in inputs if isinstance(value, Tensor)), None)
        values = {
            "the images' shape": None if images is None else tuple(images.shape),
            "the images' dtype": None if images is None else images.dtype,
            "model.training": model.training,
            "whether gradients are wanted": torch.is_grad_enabled(),
            **routing_settings(model),
        }
        if images is not None and torch.is_autocast_enabled(images.device.type):
            values["the dtype of autocast"] = torch.get_autocast_dtype(images.device.type)
        self.end = begin_same(values, self.group, RULE)
        if self.at_once:
            self.end()

    @torch.compiler.disable
    def after(self, model: nn.Module, inputs: tuple, output: Any) -> Any:
        """Ends the comparison, makes thresholds alike, and ties the losses."""
        if not self.at_once:
            self.end()
        average_thresholds(model)
        return _tie_losses(model, output)


def _tie_losses(model: nn.Module, output: Any) -> Any:
    """Makes the backward of an auxiliary loss alone begin at the model's output, where FSDP gathers its parameters."""
    records = [layer.record for layer in moe_layers(model).values()]
    records = [record for record in records if record.loss is not None and record.loss.requires_grad]
    if not records or not isinstance(output, Tensor) or not output.requires_grad:
        return output
    output, *losses = _Tied.apply(output, *(record.loss for record in records))
    for record, loss in zip(records, losses):
        record.loss = loss
    return output


class _Tied(torch.autograd.Function):
    """Copies of several tensors; each of them gets a gradient, if only zeros, when one does."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        # No views, which FSDP warns of.
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients
