"""A run whose model is spread over processes: experts over `parallel.ep`, everything else by FSDP."""

from torch import nn
from torch.utils.data import Dataset, Subset

from vmoe_torch.parallel import build_mesh, materialize, parallelize
from vmoe_torch.train.config import PRECISIONS, Config
from vmoe_torch.train.process_group import Processes


def spread_model(model: nn.Module, config: Config, group: Processes) -> nn.Module:
    """Parallelises a model that is the same in every process, or on the meta device in each of them.

    Raises:
        ValueError: if the processes are not parallel.dp * parallel.ep, or the experts do not divide.
    """
    parallel = config.parallel
    dp = group.world_size // parallel.ep if parallel.dp is None else parallel.dp
    if dp * parallel.ep != group.world_size:
        raise ValueError(
            f"parallel.dp * parallel.ep must be the number of processes {group.world_size}, got {dp} * {parallel.ep}"
        )
    try:
        spread = parallelize(
            model,
            build_mesh(dp, parallel.ep, group.device.type),
            wire_dtype=None if parallel.wire is None else PRECISIONS[parallel.wire],
            chunks=parallel.chunks,
            ranks_per_node=parallel.ranks_per_node,
            recompute=parallel.recompute,
            compile=config.run.compile,
        )
    except ValueError as error:
        raise ValueError(f"parallel: {error}") from error
    return materialize(spread, config.run.seed, group.device) if parallel.materialize else spread


class EvenShares(Subset):
    """A data set filled up with its last image, so that every process evaluates as many batches as the others.

    Args:
        dataset: with one image at least.
        group: the processes, which take contiguous shares.
    """

    def __init__(self, dataset: Dataset, group: Processes):
        count = len(dataset)
        share = -(-count // group.world_size)
        super().__init__(dataset, [min(index, count - 1) for index in range(share * group.world_size)])
        # Images of this process's share that are not filling.
        self.own = min(max(count - group.rank * share, 0), share)
