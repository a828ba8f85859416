"""A dense ViT trained on, against its upcycled copy at the same training FLOPs.

    python -m benchmarks.studies.upcycle [--epochs 15] [--more 15] [--seeds 0 1 2] [--threads 2]

A dense ViT (4 blocks of width 64, patches of 7 x 7) is trained on the Fashion-MNIST images that ship with the package.
Then the dense model goes on for some epochs, and its upcycled copy (8 experts in every other block, K=2, C=1.05, gates
renormalised, moments copied) for as many updates as cost the same FLOPs: fewer, as its updates cost more. Both see the
images in the same order and have a learning rate that begins and ends alike. Writes
benchmarks/results/fashion_mnist/upcycle.{json,md}.
"""

import copy
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.results import RESULTS, command_line, environment, heading, publish, write
from vmoe_torch.checkpoints import upcycle_optimizer
from vmoe_torch.data import FashionMnist
from vmoe_torch.data.fashion_mnist import MEAN, STD
from vmoe_torch.evaluate.flops import count_flops
from vmoe_torch.models.upcycling import upcycle

BATCH = 64
LR, WEIGHT_DECAY = 3e-3, 0.05
VIT = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10}
SPARSE = {
    "moe_layers": "every2",
    "num_experts": 8,
    "num_selected_experts": 2,
    "capacity_factor": 1.05,
    "renormalize_gates": True,
}


def images_and_labels(split: str) -> tuple[Tensor, Tensor]:
    """(N, 1, 28, 28) normalised images and (N,) labels."""
    data = FashionMnist(split)
    images = torch.from_numpy(data.images.copy()).float().div(255)
    return ((images - MEAN) / STD).unsqueeze(1), torch.from_numpy(data.labels)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images and shifts each by up to two pixels."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    tops, lefts = torch.randint(5, (2, len(images)), generator=generator).tolist()
    return torch.stack([image[:, y : y + 28, x : x + 28] for image, y, x in zip(padded, tops, lefts)])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], updates: int, seed: int):
    """So many updates on shuffled batches; the learning rate falls from LR to 0 along a cosine."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = data
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for update in range(updates):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * update / updates))
        loss = F.cross_entropy(model(augment(images[batch], generator)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Top-1 accuracy."""
    model.eval()
    images, labels = data
    return sum((model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(200), labels.split(200))) / len(
        labels
    )


def compare(seed: int, epochs: int, more: int, train_data, test_data) -> dict[str, float]:
    """Accuracies of one seed, and what was spent."""
    torch.manual_seed(seed)
    per_epoch = len(train_data[0]) // BATCH
    dense = timm.create_model("vit_tiny_patch16_224", **VIT)
    optimizer = make_optimizer(dense)
    train(dense, optimizer, train_data, epochs * per_epoch, seed)
    begin = accuracy(dense, test_data)

    sparse = upcycle(dense, **SPARSE)
    sparse_optimizer = make_optimizer(sparse)
    upcycle_optimizer(optimizer, dense, sparse_optimizer, sparse)
    flops = count_flops(sparse, train_data[0][:BATCH])
    updates = round(more * per_epoch / flops.relative)
    at_first = accuracy(sparse, test_data)
    start = time.perf_counter()
    train(sparse, sparse_optimizer, train_data, updates, seed + 1000)
    sparse_seconds = time.perf_counter() - start

    # The optimizer goes on with its moments.
    onward = copy.deepcopy(dense)
    onward_optimizer = make_optimizer(onward)
    onward_optimizer.load_state_dict(optimizer.state_dict())
    start = time.perf_counter()
    train(onward, onward_optimizer, train_data, more * per_epoch, seed + 1000)
    return {
        "seed": seed,
        "dense_before": begin,
        "upcycled_before": at_first,
        "dense_after": accuracy(onward, test_data),
        "upcycled_after": accuracy(sparse, test_data),
        "relative_flops": flops.relative,
        "dense_updates": more * per_epoch,
        "upcycled_updates": updates,
        "dense_seconds": time.perf_counter() - start,
        "upcycled_seconds": sparse_seconds,
    }


def markdown(content: dict) -> list[str]:
    """The seeds as a table, and who won in words."""
    results = content["results"]
    extra = results[0]["relative_flops"] - 1
    lines = [
        *heading("Upcycled against dense at equal training FLOPs", content["environment"]),
        f"A dense ViT was trained for {content['epochs']} epochs. It then went on for {content['more']}; "
        "its upcycled copy,",
        f"whose update costs {extra:.0%} more FLOPs, went on for the same FLOPs in fewer updates. Top-1 accuracy on",
        "the test split; before is the moment of upcycling, where the copy's capacity drops some choices.",
        "",
        "| seed | dense before | upcycled before | dense after | upcycled after | difference | updates |",
        "| --- " * 7 + "|",
    ]
    for one in results:
        keys = ("dense_before", "upcycled_before", "dense_after", "upcycled_after")
        accuracies = " | ".join(f"{one[key]:.2%}" for key in keys)
        difference = f"{100 * (one['upcycled_after'] - one['dense_after']):+.2f} points"
        lines.append(
            f"| {one['seed']} | {accuracies} | {difference} | {one['dense_updates']} / {one['upcycled_updates']} |"
        )
    differences = [100 * (one["upcycled_after"] - one["dense_after"]) for one in results]
    mean, wins = statistics.mean(differences), sum(difference > 0 for difference in differences)
    seeds = f"{len(results)} seed{'' if len(results) == 1 else 's'}"
    verdict = "beats" if min(differences) > 0 else "does not beat"
    return [
        *lines,
        "",
        f"At equal training FLOPs the upcycled model {verdict} the dense one on every seed: it is ahead on {wins} of",
        f"{seeds}, by {mean:+.2f} points on average.",
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Writes the results, seed by seed; returns the path of the Markdown."""
    parser = command_line(__doc__, RESULTS / "fashion_mnist", threads=2)
    parser.add_argument("--epochs", type=int, default=15, help="of the dense model first (%(default)s)")
    parser.add_argument("--more", type=int, default=15, help="epochs that the dense model goes on (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    data = images_and_labels("train"), images_and_labels("test")
    content = {"environment": environment(torch.device("cpu")), "epochs": options.epochs, "more": options.more}
    content["results"] = []
    for seed in options.seeds:
        content["results"].append(compare(seed, options.epochs, options.more, *data))
        write(options.out, "upcycle", content, markdown(content))
    return publish(options.out, "upcycle", content, markdown)


if __name__ == "__main__":
    main()
