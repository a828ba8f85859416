"""The loop: it learns, repeats itself to the bit, resumes to the bit, and fails before it begins."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from vmoe_torch.recipes import load_recipe
from vmoe_torch.train import build_model, loop, read_checkpoint, train
from vmoe_torch.train.record.table import read_table
from vmoe_torch.train.step import Update


def assert_same_weights(got, want):
    """Bit-equal, key by key."""
    want = want.state_dict()
    assert got.state_dict().keys() == want.keys()
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor, want[name]), name


def in_folder(config, name):
    """The same run in another folder."""
    return config.override(f"run.output={config.run.output}-{name}")


def test_train_same_seed_gives_equal_bits(tiny):
    first, second = (train(in_folder(tiny, name)) for name in ("a", "b"))
    assert_same_weights(first.model, second.model)
    assert_same_weights(first.ema, second.ema)
    assert first.updates == 10
    assert first.finished


def test_train_other_seed_gives_other_bits(tiny):
    first, second = (train(in_folder(tiny, seed).override("schedule.epochs=1", f"run.seed={seed}")) for seed in "01")
    assert not torch.equal(first.model.head.weight, second.model.head.weight)


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_resume_gives_equal_bits(tiny, stop):
    whole = train(in_folder(tiny, "whole"))
    part = train(tiny.override(f"run.max_updates={stop}"))
    assert (part.updates, part.finished) == (stop, False)
    torch.rand(7)
    resumed = train(tiny, resume=True)
    assert (resumed.updates, resumed.finished) == (10, True)
    assert_same_weights(resumed.model, whole.model)
    assert_same_weights(resumed.ema, whole.ema)
    rows = [read_metrics_without_speed(config) for config in (tiny, in_folder(tiny, "whole"))]
    assert rows[0] == rows[1]
    assert [row["update"] for row in rows[0]] == ["5", "10"]


def read_metrics_without_speed(config):
    """metrics.csv without the one column that may differ."""
    return [
        {name: value for name, value in row.items() if name != "images_per_second"}
        for row in read_table(Path(config.run.output) / "metrics.csv")
    ]


def test_resume_after_a_kill_drops_later_rows(tiny):
    train(tiny.override("run.keep_checkpoints=9", "run.checkpoint_every=3"))
    folder = Path(tiny.run.output)
    for name in ("update_00000005", "update_00000006", "update_00000009", "update_00000010"):
        shutil.rmtree(folder / "checkpoints" / name)
    assert len(read_table(folder / "metrics.csv")) == 2
    assert train(tiny, resume=True).finished
    assert [row["update"] for row in read_table(folder / "metrics.csv")] == ["5", "10"]


# Python 3.12 warns of every fork beside torch's threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_resume_with_accumulation_and_workers_gives_equal_bits(tiny):
    tiny = tiny.override("optim.accumulation=2", "schedule.epochs=1")
    whole = train(in_folder(tiny, "whole"))
    train(tiny.override("run.max_updates=3"))
    resumed = train(tiny.override("data.workers=1"), resume=True)
    assert_same_weights(resumed.model, whole.model)


def test_sigterm_saves_and_resumes_to_equal_bits(tiny, monkeypatch):
    whole = train(in_folder(tiny, "whole"))
    original = Update.__call__

    def update(self, batches):
        if self.state.update == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    monkeypatch.setattr(Update, "__call__", update)
    stopped = train(tiny)
    assert (stopped.updates, stopped.finished) == (3, False)
    monkeypatch.undo()
    assert_same_weights(train(tiny, resume=True).model, whole.model)


def test_train_lowers_the_loss_on_the_shipped_images(tmp_path):
    config = load_recipe("fashion_mnist").override(
        f"run.output={tmp_path}",
        "run.device=cpu",
        "run.progress=false",
        "run.tensorboard=false",
        "data.batch_size=180",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0.1",
        "optim.lr=5e-3",
        "model.kwargs.patch_size=14",
        "model.kwargs.embed_dim=32",
        "model.kwargs.num_heads=2",
        "model.kwargs.depth=2",
    )
    (row,) = train(config).history
    assert row["val_loss"] < 1.5
    assert row["val_accuracy"] > 0.4
    assert 0 <= row["dropped"] < 0.5
    assert row["max_load"] >= 1


def test_accumulation_gives_the_gradient_of_the_whole_batch(tiny, monkeypatch):
    gradients = {}

    def clip(parameters, limit):
        gradients.setdefault(case, [p.grad.clone() for p in parameters])
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    # No noise, no drop, no mixing between images; groups that do not depend on the batch, with room for all.
    same = [
        "data.mixup=0",
        "model.kwargs.proj_drop_rate=0",
        "model.kwargs.drop_path_rate=0",
        "model.kwargs.noise_std=0",
        "model.kwargs.group_size=image",
        "model.kwargs.capacity_factor=4",
        "run.max_updates=1",
    ]
    for case, changes in {
        "whole": [],
        "accumulated": ["optim.accumulation=4"],
        "no auxiliary loss": ["model.kwargs.importance_loss_weight=0"],
    }.items():
        train(in_folder(tiny, case.replace(" ", "")).override(*same, "model.kwargs.importance_loss_weight=1", *changes))
    names = [name for name, _ in build_model(tiny.model, 10).named_parameters()]
    for name, whole, parts, without in zip(names, *gradients.values()):
        scale = whole.abs().max().clamp(min=1e-6)
        assert (whole - parts).abs().max() <= 1e-4 * scale, name
        if name.endswith("router.weight"):
            assert (whole - without).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_train_runs_in_low_precision(tiny, precision):
    result = train(tiny.override(f"run.precision={precision}", "schedule.epochs=1"))
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert 0 < result.history[0]["train_loss"] < 3


def test_loss_scaling_keeps_the_auxiliary_gradient(tiny, monkeypatch):
    gradients = []

    def clip(parameters, limit):
        gradients.append([p.grad for p in parameters])
        return torch.zeros(())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    for case in ("float32", "float16"):
        # The model stays in float32; only the loss is scaled.
        monkeypatch.setattr(Update, "autocast", lambda self: torch.autocast("cpu", enabled=False))
        train(in_folder(tiny, case).override("run.max_updates=1", f"run.precision={case}"))
    for plain, scaled in zip(*gradients):
        torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-7)


def test_manual_auxiliary_loss_equals_the_injected(tiny):
    modes = [
        train(in_folder(tiny, mode).override("schedule.epochs=1", f"model.kwargs.auxiliary_mode={mode}"))
        for mode in ("injected", "manual")
    ]
    for injected, manual in zip(*(result.model.parameters() for result in modes)):
        torch.testing.assert_close(injected, manual, rtol=1e-3, atol=1e-5)


def test_checkpoints_keep_the_last_and_the_best(tiny):
    result = train(tiny.override("run.checkpoint_every=2", "run.keep_checkpoints=2"))
    folder = Path(tiny.run.output) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors", "update_00000008", "update_00000010"]
    best = max(result.history, key=lambda row: row["ema_val_accuracy"])
    assert read_checkpoint(tiny.run.output)["update"] == best["update"]
    assert result.best_accuracy == best["ema_val_accuracy"]


def test_unwritable_output_fails_before_anything_else(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loop, "build_data", lambda *args: pytest.fail("the data was touched"))
    with pytest.raises(ValueError, match=r"run\.output must be a folder that can be written, got .*file/run"):
        train(tiny.override(f"run.output={tmp_path}/file/run"))


def test_used_output_is_refused_without_resume(tiny):
    train(tiny.override("run.max_updates=1"))
    with pytest.raises(ValueError, match="holds checkpoints already"):
        train(tiny)


def test_resume_refuses_another_configuration(tiny):
    train(tiny.override("run.max_updates=1"))
    with pytest.raises(ValueError, match=r"optim\.lr must be that of the run to resume, 0\.003, got 0\.1"):
        train(tiny.override("optim.lr=0.1"), resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.kwargs.num_selected_experts=5", r"num_selected_experts must be in 1..num_experts=4, got 5"),
        ("model.name=vmoe_s33", r"model\.name must be a timm model, got 'vmoe_s33'; did you mean .*vmoe_s32"),
        ("model.kwargs.wings=2", "unexpected keyword argument 'wings'"),
        ("data.batch_size=81", "batch_size must be at most the 80 images"),
        ("data.batch_size=15", "even number of images"),
        ("data.interpolation=guess", "data must describe timm's transforms"),
        ("optim.name=adamwww", r"optim\.name must be one of timm's optimisers"),
        (
            "run.device=cuda:99",
            r"run\.device must be (one of \d+ CUDA devices|cpu or auto, as PyTorch sees no CUDA device), got cuda:99",
        ),
        ("data.root=/nowhere", "/nowhere must hold train-images"),
    ],
)
def test_train_refuses(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        train(tiny.override(change))


def test_train_stops_on_a_loss_that_is_not_finite(tiny):
    with pytest.raises(FloatingPointError, match=r"loss must stay finite, got NaN or Inf in update \d: .* is "):
        train(tiny.override("optim.lr=1e30", "optim.name=sgd", "optim.clip_norm=none", "schedule.warmup_epochs=0"))


def test_sigterm_while_validating_saves_and_resumes_to_equal_bits(tiny, monkeypatch):
    whole = train(in_folder(tiny, "whole"))
    forward = loop.validate

    def validate(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args)

    monkeypatch.setattr(loop, "validate", validate)
    stopped = train(tiny)
    assert (stopped.updates, stopped.finished, stopped.history) == (5, False, [])
    monkeypatch.undo()
    resumed = train(tiny, resume=True)
    assert_same_weights(resumed.model, whole.model)
    rows = [read_metrics_without_speed(config) for config in (tiny, in_folder(tiny, "whole"))]
    assert rows[0] == rows[1]


def test_model_with_other_classes_is_refused(tiny):
    with pytest.raises(ValueError, match="model must have the 10 classes of the data, got 7"):
        train(tiny.override("model.kwargs.num_classes=7"))


def test_resume_refuses_data_with_other_classes(tiny, monkeypatch):
    train(tiny.override("run.max_updates=1"))
    original = loop.build_data

    def build_data(*args):
        data = original(*args)
        data.class_names = ("shoe", *data.class_names[1:])
        return data

    monkeypatch.setattr(loop, "build_data", build_data)
    with pytest.raises(ValueError, match=r"the classes of the run to resume, 10 \(t-shirt.*\), got 10 \(shoe"):
        train(tiny, resume=True)
