"""Run by torchrun: a whole run, and one that stops and resumes; leaves the weights of both for the test to compare."""

import sys

import torch
import torch.distributed as dist

from vmoe_torch.train import Config, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = Config.from_file(sys.argv[1])
    folder = config.run.output
    dist.init_process_group("gloo")
    whole = train(config.override(f"run.output={folder}/whole"))
    part = config.override(f"run.output={folder}/part")
    train(part.override("run.max_updates=2"))
    resumed = train(part, resume=True)
    weights = {"whole": whole.model.state_dict(), "resumed": resumed.model.state_dict(), "history": whole.history}
    torch.save(weights, f"{folder}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
