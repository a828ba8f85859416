"""Run by torchrun: a run with experts on two processes, of which some die on the way.

    killed_run.py CONFIG.json [DEATH ...]

The first DEATH is for the first attempt, the next for the attempt after the first restart, and so on. "1@8" kills rank
1 after eight updates of its attempt, "0@save" kills rank 0 when a checkpoint is written but not yet complete.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

from vmoe_torch.parallel import ShardedCheckpoints, export_safetensors, join
from vmoe_torch.train import Config, train
from vmoe_torch.train.record.logs import Logs


def die(*_):
    """As a machine does that loses power."""
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(death: str) -> None:
    """Makes this process die at that moment, if it is the one."""
    rank, _, moment = death.partition("@")
    if int(rank) != dist.get_rank():
        return
    if moment == "save":
        ShardedCheckpoints._complete = die
        return
    updates = []

    def advance(_logs):
        updates.append(1)
        if len(updates) == int(moment):
            die()

    Logs.advance = advance


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, deaths = Config.from_file(sys.argv[1]), sys.argv[2:]
    join("gloo")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < len(deaths):
        prepare(deaths[attempt])
    result = train(config, resume=True)
    export_safetensors(result.model, f"{config.run.output}/model.safetensors")
    dist.destroy_process_group()
