"""What goes wrong in one of two processes ends both, soon, with the same error."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel.processes import run
from vmoe_torch.files import cannot_write
from vmoe_torch.parallel import ShardedCheckpoints
from vmoe_torch.train import train
from vmoe_torch.train.loop import TrainingRun
from vmoe_torch.train.step import Update

# Seconds, on a busy machine; those that wait for each other would take parallel.timeout.
SOON = 200.0


def _fails(config, error, match):
    began = time.monotonic()
    texts = [None, None]
    with pytest.raises(error, match=match) as caught:
        train(config)
    assert time.monotonic() - began < SOON
    dist.all_gather_object(texts, str(caught.value))
    assert texts[0] == texts[1]


def _nan_in_one_expert(config):
    original = Update.__call__

    def update(self, batches):
        norm = original(self, batches)
        if self.state.update == 0 and dist.get_rank() == 1:
            self.state.model.blocks[1].mlp.fc1.weight.to_local().data[0] = float("nan")
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Update, "__call__", update)
        _fails(config, FloatingPointError, r"in update 2: blocks\.1\.mlp\.fc1\.weight is not finite before it")


def _images_of_one_process(config):
    original = TrainingRun._updates

    def updates(self, *args):
        for number, batches in enumerate(original(self, *args), start=self.state.update):
            if number == 1 and self.group.rank == 1:
                batches[0][0].fill_(float("inf"))
            yield batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_updates", updates)
        _fails(config, FloatingPointError, "got NaN or Inf in update 2: its images are not finite")


def _other_configuration(config):
    lr = config.optim.lr * (1 + dist.get_rank())
    _fails(config.override(f"optim.lr={lr}"), ValueError, r"optim\.lr must be the same in all processes, got .* rank 1")


def _full_disk(config):
    def full(self, *arguments):
        raise cannot_write("checkpoint", self.folder, OSError(28, "full"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardedCheckpoints, "save", full)
        _fails(config, OSError, "cannot be written: No space left on device")


def _all(config):
    folder = Path(config.run.output)
    plain = config.override("run.max_updates=4", "run.log_every=1", "schedule.epochs=1", "data.workers=0")
    spread = plain.override("parallel.ep=2")
    _nan_in_one_expert(spread.override(f"run.output={folder}/expert"))
    _images_of_one_process(plain.override(f"run.output={folder}/images"))
    _other_configuration(plain.override(f"run.output={folder}/lr"))
    _full_disk(plain.override(f"run.output={folder}/full"))


def test_one_process_that_goes_wrong_ends_both_with_the_same_error(tiny, tmp_path):
    torch.manual_seed(0)
    run(2, tmp_path, _all, tiny.override("optim.ema_decay=none", "parallel.timeout=600"))
