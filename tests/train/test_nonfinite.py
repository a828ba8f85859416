"""NaN in training: the update and the module are named, and the checkpoint from before stays the last."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vmoe_torch.train import read_checkpoint, train
from vmoe_torch.train.nonfinite import FiniteWatch, explain
from vmoe_torch.train.record.table import read_table
from vmoe_torch.train.step import Update


def test_watch_keeps_the_first_update():
    watch = FiniteWatch(torch.device("cpu"))
    for update, value in ((1, 1.0), (2, float("inf")), (3, 0.0), (4, float("nan"))):
        assert watch.first() == (2 if update > 2 else None)
        watch.note(torch.tensor(value), update)
    assert watch.first() == 2


@pytest.mark.parametrize(("accumulation", "find"), [(1, True), (2, True), (1, False)])
def test_nan_names_the_module_and_keeps_the_last_good_checkpoint(tiny, monkeypatch, accumulation, find):
    original = Update.__call__

    def update(self, batches):
        weight = self.state.model.blocks[1].attn.proj.bias
        if self.state.update != 2:
            return original(self, batches)
        before = weight.detach().clone()
        weight.data[0] = float("nan")
        try:
            return original(self, batches)
        finally:
            weight.data.copy_(before)

    monkeypatch.setattr(Update, "__call__", update)
    config = tiny.override(
        "run.checkpoint_every=1",
        "run.keep_checkpoints=1",
        f"optim.accumulation={accumulation}",
        f"alarms.find_not_finite={find}",
    )
    where = r": the output of blocks\.1\.attn\.proj \(Linear\) is the first that is not finite" if find else ""
    message = rf"got NaN or Inf in update 3{where}; the last good checkpoint is .*update_00000002"
    with pytest.raises(FloatingPointError, match=message):
        train(config)
    folder = Path(config.run.output)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["update_00000002"]
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(folder)["model"].values())
    (alarm,) = read_table(folder / "alarms.csv")
    assert (alarm["update"], alarm["kind"]) == ("3", "not finite")
    monkeypatch.undo()
    assert train(config, resume=True).finished


def test_nan_goes_unnoticed_where_the_alarm_is_off(tiny):
    config = tiny.override(
        "alarms.stop_not_finite=false", "optim.lr=1e30", "optim.name=sgd", "optim.clip_norm=none", "schedule.epochs=1"
    )
    assert train(config).finished


class Root(nn.Module):
    """Its forward is finite where x is 0, its gradient is not."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Linear(2, 1)
        self.inner = nn.Linear(2, 2, bias=False)
        self.first = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.outer(self.inner(self.first(x)).abs().sqrt())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, x: model.inner.weight.data.fill_(float("inf")), "inner.weight is not finite before it"),
        (lambda model, x: x.fill_(float("nan")), "its images are not finite"),
        (lambda model, x: model.outer.weight.data.fill_(1e38), "the output of outer (Linear) is the first"),
        (lambda model, x: x.zero_(), "the gradient of inner.weight is the first that is not"),
        (lambda model, x: None, None),
    ],
)
def test_explain_finds_where_it_begins(change, message):
    torch.manual_seed(0)
    model, x = Root(), torch.full((3, 2), 1e3)
    change(model, x)

    def update(batches):
        model(batches[0][0]).sum().backward()
        # Makes all gradients NaN if one is.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    reason = explain(update, model, [(x, torch.zeros(3))])
    assert reason is None if message is None else message in reason
