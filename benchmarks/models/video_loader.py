"""Whether decoding keeps up: frames a second of the loader of videos against those that the model trains on.

    python -m benchmarks.models.video_loader [--model vmoe_video_s16] [--rounds 5] [--batch 4] [--workers 1]

Videos are written for it: noise that moves, 320 x 240 at 25 frames a second, in H.264, as users have them. The loader
reads clips at random with timm's transforms for training, in as many processes as there are cores to spare; the model
makes updates on a batch that is there already, with the threads that are left. Both alone, in turn. Writes
benchmarks/results/<machine>/models_video_loader.{json,md}.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import timm
import torch
from torch import nn

import vmoe_torch  # noqa: F401  registers the models
from benchmarks.harness.protocol import Samples
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
from vmoe_torch.cores import available_cores
from vmoe_torch.data import EpochSampler, VideoFolder, training_loader
from vmoe_torch.train import build_transforms
from vmoe_torch.train.config import DataConfig

CLASSES = 4
VIDEOS, SECONDS, RATE, SIZE = 32, 8, 25, (240, 320)
# Batches that a process has ready.
PREFETCH = 2
LOADER, MODEL = "loader", "model"


def write_videos(root: Path, videos: int = VIDEOS, seconds: int = SECONDS, size: tuple[int, int] = SIZE) -> None:
    """Class folders of H.264 files, whose pictures differ from frame to frame as those of cameras do."""
    height, width = size
    for number in range(videos):
        random = np.random.default_rng(number)
        # Blocks of 8 pixels, so that it is no noise that no codec could shrink.
        ground = np.kron(random.integers(0, 256, (height // 8, width // 8)), np.ones((8, 8))).astype(np.uint8)
        path = root / str(number % CLASSES) / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for frame in range(seconds * RATE):
                picture = np.roll(ground, (frame, 2 * frame), (0, 1))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
            container.mux(stream.encode(None))


def batches(model: nn.Module, root: Path, batch: int, workers: int) -> Iterator[torch.Tensor]:
    """Clips for a model, without end."""
    transform, _ = build_transforms(DataConfig(name="video", random_erasing=0.25), model)
    dataset = VideoFolder(root)
    sampler = EpochSampler(len(dataset), batch, seed=0)
    loader = training_loader(dataset, transform, sampler, workers, False, PREFETCH)
    epoch = 0
    while True:
        sampler.set_position(epoch, 0)
        yield from (clips for clips, _ in loader)
        epoch += 1


def run(name: str, rounds: int, batch: int, workers: int, videos: int = VIDEOS, seconds: int = SECONDS) -> dict:
    """Measures; returns what the JSON holds."""
    model = timm.create_model(name, num_classes=CLASSES).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.arange(batch) % CLASSES
    times: dict[str, list[float]] = {LOADER: [], MODEL: []}
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder), videos, seconds)
        loaded = batches(model, Path(folder), batch, workers)
        for _ in range(rounds + 1):
            # What the processes made ready in the model's turn is no measure of them.
            for _ in range(1 + PREFETCH * workers):
                clips = next(loaded)
            count = 4 * max(workers, 1)
            start = time.perf_counter()
            for _ in range(count):
                next(loaded)
            times[LOADER].append((time.perf_counter() - start) / count)
            start = time.perf_counter()
            (nn.functional.cross_entropy(model(clips), labels) + auxiliary_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            times[MODEL].append(time.perf_counter() - start)
        loaded.close()
    samples = {variant: Samples(tuple(values[1:])) for variant, values in times.items()}
    case = f"{name} B={batch} T={clips.shape[2]} {clips.shape[-1]} px, {workers} workers, {available_cores()} cores"
    frames = batch * clips.shape[2]
    return {
        "environment": environment(torch.device("cpu")),
        "frames_per_second": {variant: frames / s.median for variant, s in samples.items()},
        "bars": [vars(Limit.of("time of the loader over the model's", 1.0, samples[LOADER].over(samples[MODEL])))],
        "rows": as_dicts([row("video_loader", "both", case, *item) for item in samples.items()]),
    }


def markdown(content: dict) -> list[str]:
    """The results file."""
    rates = content["frames_per_second"]
    return [
        *heading("Whether decoding keeps up", content["environment"]),
        f"{rates[LOADER]:,.0f} frames a second are loaded, {rates[MODEL]:,.0f} trained on ({SIZE[1]} x {SIZE[0]}).",
        "",
        *limit_table(content["bars"]),
        "",
        *table(content["rows"]),
    ]


def main(arguments: list[str] | None = None) -> Path:
    """Writes the results; returns the path of the Markdown."""
    parser = command_line(__doc__)
    parser.add_argument("--model", default="vmoe_video_s16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=max(available_cores() - 1, 1))
    options = parser.parse_args(arguments)
    torch.set_num_threads(max(available_cores() - options.workers, 1))
    content = run(options.model, options.rounds, options.batch, options.workers)
    return publish(options.out / machine_name(torch.device("cpu")), "models_video_loader", content, markdown)


if __name__ == "__main__":
    main()
