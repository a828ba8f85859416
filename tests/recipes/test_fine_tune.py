"""A checkpoint of the original, fine-tuned on other images of other classes at another size, evaluated, transferred."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.weights.test_golden_checkpoints import FOLDER
from vmoe_torch.checkpoints import read_original
from vmoe_torch.cli import main
from vmoe_torch.train import read_checkpoint
from vmoe_torch.train.record.table import read_table

COLORS = {"blue": (60, 80, 160), "green": (70, 150, 80), "red": (170, 80, 70)}
# The shape of the checkpoint's model, whose images had 32 x 32 pixels and 10 classes.
SHAPE = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "moe_layers": "[1, 3]",
    "num_experts": 4,
    "img_size": 48,
    "group_size": 4,
}


@pytest.fixture(scope="module")
def paintings(tmp_path_factory):
    """A folder of noisy images of three colours: 8 of each to train on, 4 to validate."""
    folder = tmp_path_factory.mktemp("paintings")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(generator.normal(color, 40, (60, 50, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def fine_tuned(paintings, tmp_path_factory):
    """Folder of a run of the fine-tuning recipe."""
    run = tmp_path_factory.mktemp("runs") / "run"
    changes = [
        f"model.checkpoint={FOLDER / 'params_1shard' / 'ckpt'}",
        *(f"model.kwargs.{name}={value}" for name, value in SHAPE.items()),
        f"data.root={paintings}",
        "data.batch_size=12",
        "data.workers=0",
        "schedule.updates=30",
        "schedule.warmup_updates=3",
        "optim.lr=0.05",
        f"run.output={run}",
        "run.device=cpu",
        "run.precision=float32",
        "run.checkpoint_every=none",
        "run.tensorboard=false",
        "run.progress=false",
    ]
    assert main(["train", "--recipe", "finetune_in1k_384", *changes]) == 0
    return run


def test_fine_tuning_learns_from_the_checkpoint(fine_tuned):
    accuracies = [float(row["val_accuracy"]) for row in read_table(fine_tuned / "metrics.csv")]
    assert accuracies[-1] > 0.9
    state = read_checkpoint(fine_tuned / "checkpoints" / "update_00000030")
    assert state["model"]["head.weight"].shape == (3, 32)
    assert state["model"]["pos_embed"].shape == (1, 37, 32)
    # It moved, but not far: the weights are the checkpoint's, trained on.
    begun = read_original(str(FOLDER / "params_1shard" / "ckpt"))["Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"].mT
    moved = (state["model"]["blocks.1.mlp.fc1.weight"] - begun).norm() / begun.norm()
    assert 0 < moved < 0.2


def test_eval_agrees_with_the_run(fine_tuned, paintings, tmp_path):
    grid = ["--capacity=1.5,0.25", "--k=2", "--order=vanilla,bpr", "--batch-size=128"]
    assert main(["eval", str(fine_tuned), f"--data={paintings}", *grid, f"--out={tmp_path}/x.json"]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())
    best = max(float(row["val_accuracy"]) for row in read_table(fine_tuned / "metrics.csv"))
    # The released models are routed in vanilla order.
    assert (rows[0]["capacity_factor"], rows[0]["batch_priority"], rows[0]["top1"]) == (1.5, False, best)
    assert rows[2]["dropped"] > rows[0]["dropped"]
    assert rows[2]["flops"] < rows[0]["flops"]


def test_fewshot_transfers_its_features(fine_tuned, paintings, tmp_path):
    assert main(["fewshot", str(fine_tuned), f"--data={paintings}", "--shots=1,5", f"--out={tmp_path}/x.json"]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["shots"] for row in rows] == [1, 5]
    assert rows[1]["accuracy"] > 0.9
