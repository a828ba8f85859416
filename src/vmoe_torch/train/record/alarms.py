"""What a run warns of: experts that nearly all tokens choose or none does, and losses that jump.

All of it is judged at log points, from numbers that are logged anyway: an update waits for nothing more.
"""

import statistics
from collections import deque
from dataclasses import dataclass

from vmoe_torch.train.config import AlarmsConfig
from vmoe_torch.train.record.routing import LayerSample

# A median of fewer losses says little.
LEAST_LOSSES = 5


@dataclass(frozen=True)
class Alarm:
    """Something that a person should look at."""

    update: int
    """Finished updates when it sounded."""
    kind: str
    """One of "loss spike", "collapse" and "dead experts"; "not finite" where the run stopped at NaN or Inf, "data" for
    what was passed over at the start, "broken image" or "broken video" for one that cannot be read."""
    layer: str
    """The MoE layer, or empty."""
    message: str
    """What was seen, and the limit."""


class Alarms:
    """Looks at every log point; each alarm sounds when its state begins, not again while it lasts.

    Args:
        config: the limits.
        losses: of the log points before this start of the run, oldest first.
    """

    def __init__(self, config: AlarmsConfig, losses: list[float] = ()):
        self.config = config
        self.losses = deque(losses, maxlen=config.loss_window)
        # Log points in a row that each expert of a layer was chosen by nobody.
        self.idle: dict[str, list[int]] = {}
        self.sounding: set[tuple[str, str]] = set()

    def look(self, update: int, loss: float, layers: dict[str, LayerSample]) -> list[Alarm]:
        """The alarms that begin here.

        Args:
            update: finished updates.
            loss: mean since the last log point.
            layers: what the routers of each MoE layer did in the last forward.
        """
        found = {("loss spike", ""): self._spike(loss)}
        for name, layer in layers.items():
            found["collapse", name] = self._collapse(layer)
            found["dead experts", name] = self._dead(name, layer)
        begins = [key for key, message in found.items() if message is not None and key not in self.sounding]
        self.sounding = {key for key, message in found.items() if message is not None}
        return [Alarm(update, kind, layer, found[kind, layer]) for kind, layer in begins]

    def _spike(self, loss: float) -> str | None:
        limit, before = self.config.loss_spike, list(self.losses)
        self.losses.append(loss)
        if limit is None or len(before) < LEAST_LOSSES:
            return None
        usual = statistics.median(before)
        if loss <= limit * usual:
            return None
        times = f"{loss / usual:.1f}" if usual > 0 else "infinitely many"
        return f"loss {loss:.4g} is {times} times the median {usual:.4g} of the last {len(before)} log points"

    def _collapse(self, layer: LayerSample) -> str | None:
        limit = self.config.expert_share
        # Where every token goes to every expert, or experts choose their tokens, nothing can collapse.
        if limit is None or layer.assigned is None or layer.num_selected >= len(layer.assigned):
            return None
        share, expert = max((share, expert) for expert, share in enumerate(layer.assigned))
        share *= layer.num_selected
        if share <= limit:
            return None
        return f"{share:.0%} of the tokens choose expert {expert}, more than alarms.expert_share={limit:.0%}"

    def _dead(self, name: str, layer: LayerSample) -> str | None:
        limit = self.config.dead_after
        chosen = layer.load if layer.assigned is None else layer.assigned
        before = self.idle.get(name, [0] * len(chosen))
        idle = self.idle[name] = [0 if share > 0 else count + 1 for share, count in zip(chosen, before)]
        if limit is None:
            return None
        dead = [str(expert) for expert, count in enumerate(idle) if count >= limit]
        if not dead:
            return None
        return f"no token chose expert {', '.join(dead)} at the last {limit} log points"
