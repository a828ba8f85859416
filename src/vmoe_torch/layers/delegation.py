"""What a layer leaves to its router, but answers for."""

from typing import Any

from torch import nn


class OfRouter:
    """An attribute of the layer's router, read and set through the layer."""

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        return self if layer is None else getattr(layer.own_router(), self.name)

    def __set__(self, layer: nn.Module, value: Any) -> None:
        setattr(layer.own_router(), self.name, value)
