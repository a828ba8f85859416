"""The shapes that are measured, and their data.

Dims: T tokens in groups of S, D width, H hidden width, E experts, K selected, C slots per expert and group,
R rows per expert.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import vmoe_kernels as kernels
from vmoe_kernels.common import flops


@dataclass(frozen=True)
class Case:
    """A MoE layer on a batch of images; the defaults are V-MoE-B/16's at 224 px."""

    images: int = 128
    tokens_per_image: int = 196
    group_images: int = 8
    width: int = 768
    hidden: int = 3072
    num_experts: int = 32
    num_selected: int = 2
    capacity_factor: float = 1.05

    @property
    def name(self) -> str:
        return f"T={self.num_tokens} D={self.width} H={self.hidden} E={self.num_experts} K={self.num_selected}"

    @property
    def num_tokens(self) -> int:
        return self.images * self.tokens_per_image

    @property
    def group_size(self) -> int:
        """S, in tokens."""
        return min(self.group_images, self.images) * self.tokens_per_image

    @property
    def capacity(self) -> int:
        return kernels.compute_capacity(self.group_size, self.num_experts, self.capacity_factor, self.num_selected)

    @property
    def rows(self) -> int:
        """R; images divide into whole groups."""
        return kernels.rows_per_expert(self.num_tokens, self.group_size, self.capacity, self.capacity)

    @property
    def num_rows(self) -> int:
        """N = E * R rows of the expert buffer."""
        return self.num_experts * self.rows

    @property
    def mlp_flops(self) -> int:
        """Of both GEMMs at every row of the buffer; a backward costs twice that."""
        return flops.mlp_flops(self.num_rows, (self.hidden, self.width), (self.width, self.hidden))


# The headline shape first: what time is left goes to the others.
LAYERS = tuple(
    Case(images=images, num_experts=experts, num_selected=selected)
    for images in (128, 256)
    for experts in (32, 8)
    for selected in (2, 1)
)
CPU_LAYER = Case(images=64, tokens_per_image=50, width=512, hidden=2048, num_experts=8)


class Layer:
    """Weights, tokens and routing of a case, drawn from N(0, 1) and scaled as a trained layer's."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        experts, width, hidden = case.num_experts, case.width, case.hidden
        self.case = case
        self.x = normal(case.num_tokens, width)
        self.router = normal(experts, width, scale=width**-0.5)
        self.fc1_weight = normal(experts, hidden, width, scale=width**-0.5)
        self.fc1_bias = normal(experts, hidden, scale=0.1)
        self.fc2_weight = normal(experts, width, hidden, scale=hidden**-0.5)
        self.fc2_bias = normal(experts, width, scale=0.1)
        self.d_y = normal(case.num_tokens, width)

    @cached_property
    def routing(self) -> kernels.Routing:
        """The eager reference's; what follows it in a comparison gets the same slots and gates."""
        with torch.no_grad():
            return self.route("reference")

    def route(self, impl: str) -> kernels.Routing:
        case = self.case
        return kernels.route(
            self.x,
            self.router,
            num_selected_experts=case.num_selected,
            capacity=case.capacity,
            group_size=case.group_size,
            batch_priority=True,
            impl=impl,
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        names = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def buffer(self) -> Tensor:
        """(E, R, D) dispatched tokens."""
        rows = kernels.dispatch_reference(self.x, self.routing.slots, self.case.num_rows)
        return rows.view(self.case.num_experts, self.case.rows, self.case.width)
