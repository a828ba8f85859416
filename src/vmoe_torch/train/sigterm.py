"""SIGTERM and Ctrl-C, noted and obeyed between updates."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
INTERRUPTED = "\nstopping after this update, with a checkpoint; Ctrl-C once more stops at once, without\n"


class Stopped(BaseException):
    """Raised by a signal while nothing but the next batch is waited for."""


class StopSignals:
    """Notes SIGTERM and the first SIGINT in a `with` block, where Python lets us (in the main thread).

    The second SIGINT does what it did before the block, which is to raise KeyboardInterrupt.

    Attributes:
        received: whether there was one.
    """

    received = False
    _waits = False

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.getsignal(number)
                # Shells start what runs in the background deaf to Ctrl-C, which is for what runs in front.
                if number == signal.SIGTERM or before is not signal.SIG_IGN:
                    # One that was not set by Python cannot be put back.
                    self._before[number] = signal.SIG_DFL if before is None else before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
            if os.environ.get("RANK", "0") == "0":
                # Not by print, which this may have interrupted.
                os.write(2, INTERRUPTED.encode())
        if self._waits:
            raise Stopped

    def until_stopped(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, which end when a signal comes while the next one is waited for: loaders may be slow, or hang.

        Only for loaders that work in other processes: what this one does must not be left halfway.
        """
        iterator = None
        while True:
            try:
                self._waits = True
                if self.received:
                    return
                iterator = iter(batches) if iterator is None else iterator
                batch = next(iterator)
            except (StopIteration, Stopped):
                return
            finally:
                self._waits = False
            yield batch
