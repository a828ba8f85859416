"""What the arguments of a registered model become beside those of its caller."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from vmoe_torch.layers import ROUTERS, Router
from vmoe_torch.layers.options import RoutingOptions
from vmoe_torch.layers.settings import DROPLESS

# What means something else, or nothing, to a router of another kind.
_ROUTING = {*get_type_hints(RoutingOptions), "capacity_rounding", "capacity_multiple_of", "renormalize_gates"}
_ROUTING |= {"slots_per_expert"}


def merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A model's own arguments, and in their place those that its caller gives.

    Its own routing is left out where the caller's router is of another kind; a model that the caller makes dropless is
    so in eval mode, too.
    """
    own = dict(own)
    router = own.get("router", "top_experts")
    if _kind(given.get("router", router)) != _kind(router):
        own = {name: value for name, value in own.items() if name not in _ROUTING}
    if "eval_capacity_factor" in own and given.get("capacity_factor") == DROPLESS:
        # Said rather than left out: a capacity that is chosen later would bring back the model's own.
        own["eval_capacity_factor"] = DROPLESS
    return {**own, **given}


def _kind(router: str) -> set[str]:
    """What may be set of a router after training, of what most have."""
    found = (each for name, each in ROUTERS.items() if name == router)
    return set(Router.ROUTING) & set(next(found, Router).ROUTING)
