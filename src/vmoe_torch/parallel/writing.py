"""One checkpoint on its way to the disks of all ranks: in a thread, with one outcome, never for ever."""

import atexit
import datetime
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from vmoe_torch.files import cannot_write
from vmoe_torch.parallel.ranks.agreement import on_first
from vmoe_torch.parallel.ranks.failures import list_ranks
from vmoe_torch.weights.updates import reason_of


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """Makes one error of all that writing a checkpoint may raise: it names the path, the reason and the free space."""
    try:
        yield
    # DCP's is no Exception.
    except (Exception, CheckpointException) as error:
        reason = reason_of(error) if isinstance(error, CheckpointException) else ""
        raise cannot_write("checkpoint", path, error, reason) from error


class Writing:
    """A checkpoint that a thread of every rank writes; the thread alone uses the group until it has ended.

    Ranks say in the store of the process group when they begin and end to write, so that those that wait for one whose
    disk is stuck can name it.

    Args:
        path: of the checkpoint.
        group: all ranks; it gives up after its timeout.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup):
        self.path, self.group = path, group
        self.rank = dist.get_rank()
        self.store = dist.PrefixStore(f"checkpoints/{group.group_name}", dist.distributed_c10d._get_default_store())
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None

    def begin(
        self, tensors: dict[str, Tensor], partial: Path, prepare: Callable[[], None], complete: Callable[[], None]
    ) -> None:
        """Starts the thread.

        Args:
            tensors: on the CPU, and nobody else's.
            partial: folder to write into.
            prepare: makes it; run by the first rank.
            complete: makes it the checkpoint; run by the first rank when all have written.
        """

        def write() -> None:
            try:
                on_first(lambda: self._on_disk(prepare), self.group)
                dcp.save(tensors, storage_writer=_Writer(partial, self), process_group=self.group)
                on_first(lambda: self._on_disk(complete), self.group)
            # DCP's is no Exception.
            except (Exception, CheckpointException) as error:
                self.error = error

        # A process whose disk is stuck must be able to end; any other gives its last checkpoint the time.
        self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self.thread.start()
        atexit.register(self.thread.join)

    def wait(self, timeout: datetime.timedelta) -> None:
        """Until all ranks have written.

        Raises:
            OSError: on all ranks, if one could not write, or does not within the timeout.
        """
        self.thread.join(timeout.total_seconds())
        atexit.unregister(self.thread.join)
        if not self.thread.is_alive() and self.error is None:
            return
        with writes(self.path):
            # What DCP has told all ranks is the reason itself.
            if not isinstance(self.error, CheckpointException | OSError):
                stuck = self._writing_now()
                if stuck:
                    answer = "does" if len(stuck) == 1 else "do"
                    raise TimeoutError(
                        f"the disk of {list_ranks(stuck)} {answer} not answer within {timeout.total_seconds():g} s"
                    ) from self.error
            raise self.error or TimeoutError(f"not done within {timeout.total_seconds():g} s")

    def _on_disk(self, action: Callable):
        """Tells the others while the action writes."""
        self.store.set(str(self.rank), "writes")
        try:
            return action()
        finally:
            self.store.set(str(self.rank), "")

    def _writing_now(self) -> list[int]:
        """Ranks that began to write and have not ended; none if the store has gone with the process that kept it."""
        try:
            ranks = range(dist.get_world_size(self.group))
            return [rank for rank in ranks if self.store.check([str(rank)]) and self.store.get(str(rank)) == b"writes"]
        except RuntimeError:
            return []


class _Writer(dcp.FileSystemWriter):
    """DCP's, which tells when it writes."""

    def __init__(self, path: Path, writing: Writing):
        super().__init__(path)
        self.writing = writing

    def write_data(self, *args, **kwargs):
        def write():
            done = super(_Writer, self).write_data(*args, **kwargs)
            done.wait()
            return done

        return self.writing._on_disk(write)

    def finish(self, *args, **kwargs):
        return self.writing._on_disk(lambda: super(_Writer, self).finish(*args, **kwargs))
