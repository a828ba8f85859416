"""E3, efficient ensembles of experts (arXiv 2110.03360): M members that share all but the experts.

The batch is repeated before the first MoE layer, and member m is routed among its own E / M experts only.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Unpack

import torch
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from vmoe_kernels.common.checks import check_integer
from vmoe_torch.layers import MoeMlp
from vmoe_torch.layers.sizes import per_expert
from vmoe_torch.models.blocks import parse_moe_layers
from vmoe_torch.models.options import MoeLayers, VMoEOptions
from vmoe_torch.models.variants import merged
from vmoe_torch.models.vmoe import VMoE, create_vmoe, released_cfg

EnsembleOutput = Literal["probabilities", "log_probabilities", "members"]
OUTPUTS = ("probabilities", "log_probabilities", "members")


@register_notrace_module
class EnsembleMoeMlp(nn.Module):
    """One `MoeMlp` per member, each with its share of the experts.

    Args:
        in_features: D.
        ensemble_size: M, a divisor of num_experts.
        num_experts: E, of all members together.
        expert_hidden: as of `MoeMlp`, of all members together: the first E / M are those of the first member.
        importance_loss_weight: of the mean over members.
        load_loss_weight: of the mean over members.
        gshard_loss_weight: of the mean over members.
        size_loss_weight: of the mean over members.
        router_z_loss_weight: of the mean over members.
        **moe: what `MoeMlp` takes. The router noise is divided by E / M.

    Shape:
        (B * M, L, D) -> (B * M, L, O); the members of an image follow each other.
    """

    def __init__(
        self,
        in_features: int,
        *args: Any,
        ensemble_size: int,
        num_experts: int,
        expert_hidden: Sequence[int | float] | int | float | None = None,
        importance_loss_weight: float,
        load_loss_weight: float,
        gshard_loss_weight: float,
        size_loss_weight: float = 0.0,
        router_z_loss_weight: float = 0.0,
        **moe: Any,
    ) -> None:
        super().__init__()
        ensemble_size = check_integer("ensemble_size", ensemble_size, 1)
        num_experts = check_integer("num_experts", num_experts, 1)
        if num_experts % ensemble_size:
            raise ValueError(f"num_experts must be a multiple of ensemble_size={ensemble_size}, got {num_experts}")
        widths = per_expert(expert_hidden, num_experts)
        own = num_experts // ensemble_size
        weights = {
            "importance_loss_weight": importance_loss_weight,
            "load_loss_weight": load_loss_weight,
            "gshard_loss_weight": gshard_loss_weight,
            "size_loss_weight": size_loss_weight,
            "router_z_loss_weight": router_z_loss_weight,
        }
        self.members = nn.ModuleList(
            MoeMlp(
                in_features,
                *args,
                num_experts=own,
                expert_hidden=None if widths is None else widths[member * own : (member + 1) * own],
                **{name: weight / ensemble_size for name, weight in weights.items()},
                **moe,
            )
            for member in range(ensemble_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(0, (-1, len(self.members))).unbind(1)
        return torch.stack([member(part) for member, part in zip(self.members, parts)], 1).flatten(0, 1)


class EnsembleBlock(vit.Block):
    """timm's Block with an `EnsembleMoeMlp` where `depth` is among `moe_layers`; the first one repeats the batch."""

    def __init__(
        self,
        *args: Any,
        ensemble_size: int,
        depth: int = 0,
        moe_layers: tuple[int, ...] = (),
        moe: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if depth in moe_layers:
            kwargs["mlp_layer"] = partial(EnsembleMoeMlp, ensemble_size=ensemble_size, **moe)
        super().__init__(*args, depth=depth, **kwargs)
        self.repeats = ensemble_size if depth == moe_layers[0] else 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(x.repeat_interleave(self.repeats, 0) if self.repeats > 1 else x, *args, **kwargs)


class VMoEEnsemble(VMoE):
    """V-MoE whose members vote.

    In training the logits of every member, (B * M, num_classes), those of an image in a row, as the original has them:
    repeat the labels. In eval mode `ensemble_output` says what comes out.

    Args:
        ensemble_size: M; at least one layer must be sparse.
        ensemble_output: in eval mode, "probabilities" averaged over members (B, num_classes), their logarithms, or the
            logits of all "members" as in training.
        **kwargs: what `VMoE` takes; num_experts counts those of all members.
    """

    def __init__(
        self,
        *args: Any,
        ensemble_size: int = 2,
        ensemble_output: EnsembleOutput = "probabilities",
        depth: int = 12,
        moe_layers: MoeLayers = "last2",
        **kwargs: Unpack[VMoEOptions],
    ) -> None:
        if ensemble_output not in OUTPUTS:
            raise ValueError(f"ensemble_output must be one of {OUTPUTS}, got {ensemble_output!r}")
        if not parse_moe_layers(moe_layers, depth):
            raise ValueError("moe_layers must name at least one block for an ensemble, got none")
        ensemble_size = check_integer("ensemble_size", ensemble_size, 1)
        block = partial(EnsembleBlock, ensemble_size=ensemble_size)
        super().__init__(*args, depth=depth, moe_layers=moe_layers, block_fn=block, **kwargs)
        self.ensemble_size = ensemble_size
        self.ensemble_output = ensemble_output

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        logits = super().forward(x, attn_mask)
        if self.training or self.ensemble_output == "members":
            return logits
        return average_members(logits, self.ensemble_size, self.ensemble_output == "log_probabilities")


def average_members(logits: Tensor, ensemble_size: int, log: bool = False) -> Tensor:
    """Probabilities averaged over members.

    Args:
        logits: (B * M, num_classes), the members of an image in a row.
        ensemble_size: M.
        log: whether to return their logarithms.

    Returns:
        (B, num_classes) in logits.dtype.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = wide.unflatten(0, (-1, ensemble_size)).log_softmax(-1).logsumexp(1) - math.log(ensemble_size)
    return (log_p if log else log_p.exp()).to(logits.dtype)


default_cfgs = generate_default_cfgs(
    {
        "eee_s32_last2_e8.in1k": released_cfg("eee_s32_last2_ilsvrc2012"),
        "eee_s32_last2_e8_128.in1k_ft_cifar100": released_cfg(
            "eee_s32_last2_ilsvrc2012_ft_cifar100",
            num_classes=100,
            input_size=(3, 128, 128),
            crop_pct=1.0,
            crop_mode="squash",
        ),
    }
)


def _create_eee(variant: str, pretrained: bool, **kwargs: Any) -> VMoEEnsemble:
    args = {
        "patch_size": 32,
        "embed_dim": 512,
        "depth": 8,
        "num_heads": 8,
        "moe_layers": "last2",
        "num_experts": 8,
        "num_selected_experts": 1,
        "capacity_factor": 1.5,
        "batch_priority": False,
        "dispatch_dtype": "bfloat16",
        "representation_size": True,
    }
    return create_vmoe(variant, pretrained, VMoEEnsemble, **merged(args, kwargs))


@register_model
def eee_s32_last2_e8(pretrained: bool = False, **kwargs: Any) -> VMoEEnsemble:
    """The released E3-S/32: two members of four experts each, K=1; routed as its fine-tuning is configured."""
    return _create_eee("eee_s32_last2_e8", pretrained, **kwargs)


@register_model
def eee_s32_last2_e8_128(pretrained: bool = False, **kwargs: Any) -> VMoEEnsemble:
    """The released E3-S/32, fine-tuned on CIFAR-100 at 128 px."""
    return _create_eee("eee_s32_last2_e8_128", pretrained, **{"img_size": 128, **kwargs})
