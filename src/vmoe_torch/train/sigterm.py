"""SIGTERM, noted and obeyed between updates."""

import signal
import threading
from typing import Any


class Sigterm:
    """Notes SIGTERM in a `with` block, where Python lets us (in the main thread)."""

    received = False

    def __enter__(self) -> "Sigterm":
        self.installed = threading.current_thread() is threading.main_thread()
        if self.installed:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if self.installed:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: Any) -> None:
        self.received = True
