"""The training loop against a bare one, and how long it waits for its images.

    python -m benchmarks.models.train_loop [--rounds 15] [--updates 20] [--threads 2] [--device cpu]

Bare is forward, loss, backward, clipping and the optimiser's step on images that are there already. The loop is
`vmoe_torch.train` with everything that it has on by default (logs, TensorBoard, routing statistics, alarms), on the
demo's model, optimiser and batch, with synthetic images, which need no decoding and no augmentation. A round has some
updates of each, in turn; a log point falls into every round. Both loops first have to end with the same weights after
the same batches. Then the demo trains on its own images, augmented, and what it waits for them is timed. Writes
benchmarks/results/<machine>/models_train_loop.{json,md}.
"""

import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks.harness.protocol import Samples, relative_error
from benchmarks.harness.results import (
    Limit,
    as_dicts,
    command_line,
    environment,
    heading,
    limit_table,
    machine_name,
    publish,
    row,
    table,
)
from vmoe_torch.control import auxiliary_loss
from vmoe_torch.demo import CONFIG
from vmoe_torch.train import Config, TrainResult, build_model, loop
from vmoe_torch.train.build import Splits, build_loss
from vmoe_torch.train.determinism import seed_everything
from vmoe_torch.train.optimizer import build_optimizer

BARE, OURS = "bare", "vmoe_torch.train"
WHOLE, WAITING = "whole update", "of that, waiting"
CLASSES = tuple(str(number) for number in range(10))
# At least 95 % of the bare loop's rate, and of the demo's time for training.
MOST_OVER_BARE = 1 / 0.95
MOST_WAITING = 0.05
Batches = list[tuple[Tensor, Tensor]]


class Synthetic(Dataset):
    """Images that are tensors already; any number of them, all in one small batch of memory."""

    class_names = CLASSES

    def __init__(self, images: Tensor, count: int):
        self.images = images
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % len(self.images)], index % len(CLASSES)

    def digest(self) -> str:
        """Of the images, as every data set of a run has one."""
        return hashlib.sha256(self.images.cpu().numpy().tobytes()).hexdigest()


class Clock:
    """Seconds since the last look, the device's work included."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = time.perf_counter()

    def look(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def bare_loop(config: Config, device: torch.device) -> tuple[nn.Module, Callable[[Tensor, Tensor], None]]:
    """A model as a run begins with, and a call that makes one update of it as the shortest loop does."""
    seed_everything(config.run.seed)
    model = build_model(config.model, len(CLASSES)).to(device).train()
    seed_everything(config.run.seed, 0)
    optimizer = build_optimizer(model, config.optim)
    loss_of = build_loss(config).to(device)

    def update(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model(images), labels).add(auxiliary_loss(model).to(device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()

    return model, update


def run_loop(
    config: Config,
    updates: int,
    between: Callable[[Iterator[Batches]], Iterator[Batches]],
    images: Tensor | None = None,
) -> TrainResult:
    """`vmoe_torch.train` at a constant learning rate.

    Args:
        config: of the run.
        updates: how many.
        between: what passes on the batches of each update.
        images: (B, C, H, W) of a batch of synthetic images; None for the run's own data.
    """
    own = loop.TrainingRun._updates
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(loop.TrainingRun, "_updates", lambda run, stop: between(own(run, stop))))
        if images is not None:
            data = Splits(Synthetic(images, len(images) * (updates + 1)), Synthetic(images, len(images)), CLASSES)
            stack.enter_context(mock.patch.object(loop, "build_data", return_value=data))
            stack.enter_context(mock.patch.object(loop, "build_transforms", return_value=(_as_it_is, _as_it_is)))
            config = config.override("data.workers=0")
        return loop.train(
            config.override(
                f"run.output={folder}/run",
                f"run.max_updates={updates}",
                "schedule.name=step",
                "schedule.warmup_epochs=0",
            )
        )


def _as_it_is(image: Tensor) -> Tensor:
    return image


def synthetic_images(config: Config) -> Tensor:
    """A batch of N(0, 1) for the model."""
    model = build_model(config.model, len(CLASSES))
    return torch.randn(config.data.batch_size, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def check_loops(config: Config, images: Tensor, device: torch.device, updates: int = 3) -> None:
    """Both loops have the same weights after some updates on the same batches.

    Raises:
        RuntimeError: naming the first weight that differs.
    """
    seen: Batches = []

    def record(all_batches: Iterator[Batches]) -> Iterator[Batches]:
        for batches in all_batches:
            seen.extend(batches)
            yield batches

    ours = run_loop(config, updates, record, images).model.state_dict()
    model, update = bare_loop(config, device)
    for batch in seen:
        update(*(part.to(device) for part in batch))
    for name, weight in model.state_dict().items():
        error = relative_error(ours[name], weight)
        if not error <= 1e-5:
            raise RuntimeError(f"{name} must be within 1e-5 of the bare loop's, got {error:.1e}: nothing is timed")


def time_loops(config: Config, images: Tensor, device: torch.device, rounds: int, updates: int) -> dict[str, Samples]:
    """Seconds per update of both loops, in turn: the bare one has its updates between two of the other's.

    Args:
        config: of the run.
        images: (B, C, H, W) of a batch.
        device: where both run.
        rounds: after one that warms up.
        updates: of each loop in a round.
    """
    _, update = bare_loop(config, device)
    batch = images.to(device), torch.arange(len(images), device=device) % len(CLASSES)
    seconds: dict[str, list[float]] = {BARE: [], OURS: []}
    clock = Clock(device)

    def take_turns(all_batches: Iterator[Batches]) -> Iterator[Batches]:
        for number in itertools.count():
            if number % updates == 0:
                if number:
                    seconds[OURS].append(clock.look() / updates)
                clock.look()
                for _ in range(updates):
                    update(*batch)
                seconds[BARE].append(clock.look() / updates)
            # Loading the batch is the loop's.
            yield next(all_batches)

    config = config.override(f"run.log_every={min(updates, config.run.log_every)}")
    run_loop(config, (rounds + 1) * updates + 1, take_turns, images)
    return {name: Samples(tuple(values[1 : rounds + 1])) for name, values in seconds.items()}


def time_waiting(config: Config, updates: int) -> dict[str, Samples]:
    """Seconds of each update of the demo on its own images, and those of them that it waits for the batch."""
    waits, ends = [], []

    def watch(all_batches: Iterator[Batches]) -> Iterator[Batches]:
        while True:
            start = time.perf_counter()
            batches = next(all_batches)
            ends.append(time.perf_counter())
            waits.append(ends[-1] - start)
            yield batches

    # The first ones start the processes that load, and fill their queue.
    warm_up = 2 * config.data.prefetch * max(config.data.workers, 1)
    run_loop(config, warm_up + updates + 1, watch)
    whole = [end - start for start, end in itertools.pairwise(ends)]
    return {WHOLE: Samples(tuple(whole[warm_up:])), WAITING: Samples(tuple(waits[1 + warm_up :]))}


def run(config: Config, device: torch.device, rounds: int, updates: int) -> dict:
    """Checks, then times; returns what the JSON holds."""
    config = config.override("run.progress=false", f"run.device={device}")
    images = synthetic_images(config)
    check_loops(config, images, device)
    loops = time_loops(config, images, device, rounds, updates)
    demo = time_waiting(config, min(rounds * updates, 100))
    case = f"{config.model.name} B={len(images)} {images.shape[-1]} px"
    rows = [row("train_loop", "both", case, name, samples) for name, samples in loops.items()]
    rows += [row("demo", "both", f"{case}, {config.data.workers} workers", *item) for item in demo.items()]
    waiting = sum(demo[WAITING].seconds) / sum(demo[WHOLE].seconds)
    bars = [
        Limit.of(f"update of {OURS} over a bare one", MOST_OVER_BARE, loops[OURS].over(loops[BARE])),
        Limit("share of the demo's training that waits for the loader", MOST_WAITING, waiting, waiting, waiting),
    ]
    return {
        "environment": environment(device),
        "precision": config.run.precision,
        "rounds": rounds,
        "updates": updates,
        "bars": [vars(bar) for bar in bars],
        "rows": as_dicts(rows),
    }


def markdown(content: dict) -> list[str]:
    """The results file."""
    return [
        *heading(f"The training loop against a bare one, {content['precision']}", content["environment"]),
        f"{content['rounds']} rounds of {content['updates']} updates of each loop, in turn; "
        "medians over rounds (20%..80%). Before that,",
        "both ended with the same weights after the same batches. 1.05 over the bare loop is 95 % of its rate.",
        "",
        *limit_table(content["bars"]),
        "",
        *table(content["rows"]),
    ]


def main(arguments: list[str] | None = None) -> Path:
    """Writes the results; returns the path of the Markdown."""
    parser = command_line(__doc__, threads=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=20, help="of each loop in a round")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    content = run(CONFIG, device, options.rounds, options.updates)
    return publish(options.out / machine_name(device), "models_train_loop", content, markdown)


if __name__ == "__main__":
    main()
