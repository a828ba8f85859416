"""Run by torchrun: a run with experts on two processes, of which the second may die once in the middle."""

import os
import signal
import sys

import torch
import torch.distributed as dist

from vmoe_torch.parallel import export_safetensors, join
from vmoe_torch.train import Config, train
from vmoe_torch.train.logs import Logs

if __name__ == "__main__":
    torch.set_num_threads(1)
    config, dies_at = Config.from_file(sys.argv[1]), int(sys.argv[2])
    join("gloo")
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
        updates = []

        def advance(_logs):
            updates.append(1)
            if len(updates) == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

        Logs.advance = advance
    result = train(config, resume=True)
    export_safetensors(result.model, f"{config.run.output}/model.safetensors")
    dist.destroy_process_group()
