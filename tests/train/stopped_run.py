"""A run that a test stops: `python stopped_run.py CONFIG.json [UPDATE]` kills itself halfway through saving it."""

import io
import os
import signal
import sys

import torch

from vmoe_torch.train import Config, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = Config.from_file(sys.argv[1])
    save = torch.save
    if len(sys.argv) > 2:

        def die(state, file):
            if state["update"] != int(sys.argv[2]):
                return save(state, file)
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = die
    train(config)
