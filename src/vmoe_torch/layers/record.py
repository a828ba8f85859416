"""What a MoE layer remembers of its last forward, for statistics and for adding the auxiliary loss by hand."""

from torch import Tensor


class Record:
    """References to a layer's last routing: no computation, and empty in copies, so deepcopy, EMA and pickling work."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.gates: Tensor | None = None  # (T, K)
        self.experts: Tensor | None = None  # (T, K) int32
        self.slots: Tensor | None = None  # (T, K) int32, -1 where dropped
        self.importance: Tensor | None = None  # (G, E)
        self.load: Tensor | None = None  # (G, E)
        self.mean_gates: Tensor | None = None  # (G, E)
        self.top1_share: Tensor | None = None  # (G, E)
        self.loss: Tensor | None = None  # 0-dim; part of the graph in the "manual" mode
        self.group_tokens = 0
        self.images = 0

    def __deepcopy__(self, memo) -> "Record":
        return Record()

    def __reduce__(self):
        return (Record, ())
