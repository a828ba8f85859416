"""Alarms: each sounds once when its state begins, and can be turned off."""

import pytest

from vmoe_torch.train.config import AlarmsConfig
from vmoe_torch.train.record.alarms import Alarms
from vmoe_torch.train.record.routing import LayerSample

EVEN = LayerSample([0.25] * 4, [0.25] * 4, 0.0, 0.0, num_selected=2)


def collapsed(share, num_selected=1):
    """Four experts, of which the third gets a share of the choices."""
    rest = (1 - share) / 3
    return LayerSample([0.25] * 4, [rest, rest, share, rest], 1.0, 0.5, num_selected)


def kinds(alarms):
    return [(alarm.update, alarm.kind, alarm.layer) for alarm in alarms]


def test_collapse_is_a_share_of_tokens_and_sounds_once():
    alarms = Alarms(AlarmsConfig(expert_share=0.8))
    assert alarms.look(10, 1.0, {"a": collapsed(0.79), "b": collapsed(0.39, num_selected=2)}) == []
    (alarm,) = alarms.look(20, 1.0, {"a": collapsed(0.79), "b": collapsed(0.45, num_selected=2)})
    assert (alarm.update, alarm.kind, alarm.layer) == (20, "collapse", "b")
    assert alarm.message == "90% of the tokens choose expert 2, more than alarms.expert_share=80%"
    assert alarms.look(30, 1.0, {"b": collapsed(0.45, num_selected=2)}) == []
    assert alarms.look(40, 1.0, {"b": EVEN}) == []
    assert kinds(alarms.look(50, 1.0, {"b": collapsed(0.45, num_selected=2)})) == [(50, "collapse", "b")]


def test_no_collapse_where_all_experts_take_all_tokens_or_choose_them():
    alarms = Alarms(AlarmsConfig(expert_share=0.5))
    all_of_them = LayerSample([0.5, 0.5], [0.5, 0.5], 0.0, 0.0, num_selected=2)
    choosing = LayerSample([1.0, 0.0], None, None, None, num_selected=1)
    assert alarms.look(1, 1.0, {"a": all_of_them, "b": choosing}) == []


def test_dead_experts_need_log_points_in_a_row():
    alarms = Alarms(AlarmsConfig(dead_after=3))
    idle = LayerSample([0.5, 0.5, 0.0], [0.5, 0.5, 0.0], 0.7, 0.0, num_selected=1)
    alive = LayerSample([0.5, 0.4, 0.1], [0.5, 0.4, 0.1], 0.5, 0.0, num_selected=1)
    found = [alarms.look(n, 1.0, {"a": layer}) for n, layer in enumerate([idle, idle, alive, idle, idle, idle, idle])]
    assert [bool(each) for each in found] == [False] * 5 + [True, False]
    assert found[5][0].message == "no token chose expert 2 at the last 3 log points"


def test_loss_spike_is_against_the_median_of_the_last_losses():
    alarms = Alarms(AlarmsConfig(loss_spike=2.0, loss_window=5), losses=[9.0, 1.0, 1.0, 1.1])
    assert alarms.look(1, 20.0, {}) == []
    assert alarms.look(2, 1.9, {}) == []
    (alarm,) = alarms.look(3, 2.3, {})
    assert alarm.message == "loss 2.3 is 2.1 times the median 1.1 of the last 5 log points"


@pytest.mark.parametrize("off", ["expert_share", "dead_after", "loss_spike"])
def test_alarms_can_be_turned_off(off):
    config = AlarmsConfig(**{"expert_share": 0.8, "dead_after": 1, "loss_spike": 2.0, off: None})
    alarms = Alarms(config, losses=[1.0] * 5)
    dead_and_collapsed = LayerSample([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], 1.4, 0.5, num_selected=1)
    names = {"expert_share": "collapse", "dead_after": "dead experts", "loss_spike": "loss spike"}
    found = {alarm.kind for alarm in alarms.look(1, 100.0, {"a": dead_and_collapsed})}
    assert found == set(names.values()) - {names[off]}
