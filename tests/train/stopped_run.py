"""A run that a test stops: `python stopped_run.py CONFIG.json [UPDATE]` kills itself halfway through saving it."""

import os
import signal
import sys

import torch
from torch.distributed.checkpoint import FileSystemWriter

from vmoe_torch.train import Config, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = Config.from_file(sys.argv[1])
    write = FileSystemWriter.write_data
    if len(sys.argv) > 2:

        def die(self, *arguments):
            done = write(self, *arguments)
            if self.path.name == f".update_{int(sys.argv[2]):08d}":
                done.wait()
                file = self.path / "__0_0.distcp"
                os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        FileSystemWriter.write_data = die
    train(config)
