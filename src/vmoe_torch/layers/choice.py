"""Routing that travels: what was chosen of a layer's routing after it was made goes where its weights go.

It is kept in the metadata of a state dict, beside the versions that PyTorch keeps there, so that no key is added. A
state dict copied into a plain dict has none, and then a load leaves the routing as it is.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

# In the metadata of a layer, and of a model; the latter is from `models.description`.
ROUTING_KEY = "vmoe_routing"
MODEL_KEY = "vmoe_model"
# In the header of a safetensors file: JSON of both.
FILE_KEY = "vmoe_torch_metadata"


class TravellingRouting(nn.Module):
    """A layer whose chosen routing is saved and loaded with its weights.

    A subclass has `routing`, {name: value} of all that may change, and `set_routing`, which checks and sets it all.
    """

    # TorchScript knows none of their types, and none of its functions reads them.
    __jit_ignored_attributes__ = ("_made", "_chosen", "_before_load")

    # As the layer was made; None in layers that were pickled before this was kept.
    _made: dict[str, Any] | None = None
    # What was set since, though it may be what the layer was made with.
    _chosen: frozenset[str] = frozenset()
    # What the last load brought, and what was there before it.
    _before_load: dict[str, Any] | None = None

    def routing(self) -> dict[str, Any]:
        """How the layer routes now, as `set_routing` takes it."""
        raise NotImplementedError

    def routing_note(self) -> str:
        """What there is to say of a layer where other routing cannot be set."""
        return ""

    def chosen_routing(self) -> dict[str, Any]:
        """The part of it that was chosen after the layer was made."""
        made = self._made or {}
        return {
            name: value
            for name, value in self.routing().items()
            if name in self._chosen or made.get(name, value) != value
        }

    def choose_routing(self, changes: dict[str, Any]) -> None:
        """Sets some of the routing for good; on an error nothing changes.

        Args:
            changes: of the names in `routing`.

        Raises:
            ValueError: if a name or a value is off.
        """
        now = self.routing()
        if unknown := sorted(changes.keys() - now.keys()):
            raise ValueError(
                f"routing must be among {', '.join(now)} in this layer{self.routing_note()}, got {', '.join(unknown)}"
            )
        self.set_routing(**{**now, **changes})
        self._chosen = self._chosen | changes.keys()
        self._before_load = _without(self._before_load, changes)

    def routing_state(self) -> tuple:
        """All that `restore_routing` needs."""
        return self.routing(), self._chosen, self._before_load

    def restore_routing(self, state: tuple) -> None:
        """Puts back what `routing_state` gave."""
        now, self._chosen, self._before_load = state
        self.set_routing(**now)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[ROUTING_KEY] = self.chosen_routing()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        brought = local_metadata.get(ROUTING_KEY)
        # Routing comes with the weights of its layer.
        if brought is None or not any(name.startswith(prefix) for name in state_dict):
            return
        before = self._before_load or {}
        # What an earlier load brought goes with the weights it came with.
        now = {**self.routing(), **before}
        try:
            self.set_routing(**{**now, **brought})
        except (TypeError, ValueError) as error:
            error_msgs.append(f"routing of {prefix[:-1]}: {error}")
            return
        self._before_load = {name: now[name] for name in brought}
        self._chosen = (self._chosen - before.keys()) | brought.keys()


def _without(values: dict[str, Any] | None, names: Iterable[str]) -> dict[str, Any] | None:
    return None if values is None else {name: value for name, value in values.items() if name not in set(names)}


def metadata_of(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What a state dict says of the model, in plain values for JSON: {module: {key: value}}; empty if it says nothing.

    Args:
        state: of a model, or of a wrapper that has one as its "module" or such.
    """
    kept = {}
    for module, values in (getattr(state, "_metadata", None) or {}).items():
        own = {key: values[key] for key in (ROUTING_KEY, MODEL_KEY) if key in values}
        if own:
            kept[module] = own
    return kept


def description_of(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What `models.description.describe` found when this state dict was made, if it says it."""
    return metadata_of(state).get("", {}).get(MODEL_KEY)


def with_metadata(state: Mapping[str, Tensor], metadata: Mapping[str, dict[str, Any]]) -> "OrderedDict[str, Tensor]":
    """A copy of a state dict that says this of the model."""
    copy = OrderedDict(state)
    copy._metadata = OrderedDict((module, dict(values)) for module, values in metadata.items())
    return copy


def restore_routing(model: nn.Module, metadata: Mapping[str, dict[str, Any]], source: str) -> list[tuple]:
    """Sets the routing that was chosen when a state dict was made: for loads that do not keep its metadata.

    Args:
        model: with the layers of that one; nothing in it changes on an error.
        metadata: as `metadata_of` found it.
        source: where it comes from, for errors.

    Returns:
        [(layer, what puts its routing back)].

    Raises:
        ValueError: if a layer is not there or cannot be set so.
    """
    chosen = {module: values[ROUTING_KEY] for module, values in metadata.items() if values.get(ROUTING_KEY)}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TravellingRouting)}
    if missing := sorted(chosen.keys() - layers.keys()):
        raise ValueError(f"{source} must fit the model: it has a routing for {', '.join(missing)}, which is not there")
    before = [(layer, layer.routing_state()) for layer in layers.values()]
    try:
        for name, changes in chosen.items():
            layers[name].choose_routing(changes)
    except (TypeError, ValueError) as error:
        for layer, state in before:
            layer.restore_routing(state)
        raise ValueError(f"{source} must fit the model: {error}") from None
    return before
