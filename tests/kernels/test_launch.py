"""Launch tables: what a look-up finds, in which order, and what it refuses."""

import pytest
import torch

from vmoe_kernels.common import launch
from vmoe_kernels.common.launch import ANY, Config, look_up, override, recording, register_table, size_bucket

CPU = torch.device("cpu")
FALLBACK, BUCKET, VERSION, DEVICE = (Config({"BLOCK": size}, num_warps=4) for size in (16, 32, 64, 128))


@pytest.fixture
def table(monkeypatch):
    """Registers a table "op" for one test, on a device of kind sm90 and Triton 3.6."""
    monkeypatch.setattr(launch, "_TABLES", {})
    monkeypatch.setattr(launch, "_CANDIDATES", {})
    monkeypatch.setattr(launch, "device_kind", lambda device: "sm90")
    monkeypatch.setattr(launch, "triton_version", lambda: "3.6")

    def register(entries, **options):
        register_table("op", {(ANY, ANY, ANY): FALLBACK, **entries}, **options)

    return register


def test_look_up_falls_back_to_any(table):
    table({("sm80", ANY, ANY): DEVICE, (ANY, "3.8", ANY): VERSION, (ANY, ANY, "le64"): BUCKET})
    assert look_up("op", CPU, "le128") == FALLBACK
    assert look_up("op", CPU) == FALLBACK


def test_look_up_prefers_device_then_version_then_bucket(table):
    entries = {(ANY, ANY, "le64"): BUCKET}
    table(entries)
    assert look_up("op", CPU, "le64") == BUCKET
    entries[ANY, "3.6", ANY] = VERSION
    table(entries)
    assert look_up("op", CPU, "le64") == VERSION
    entries["sm90", ANY, ANY] = DEVICE
    table(entries)
    assert look_up("op", CPU, "le64") == DEVICE


def test_look_up_is_one_config_under_deterministic_algorithms(table):
    table({("sm90", ANY, ANY): DEVICE, ("sm90", ANY, "le64"): BUCKET, ("sm90", "3.6", ANY): VERSION})
    assert look_up("op", CPU, "le64") == VERSION
    torch.use_deterministic_algorithms(True)
    try:
        assert look_up("op", CPU, "le64") == look_up("op", CPU, "gt64") == DEVICE
    finally:
        torch.use_deterministic_algorithms(False)


def test_look_up_names_an_unknown_op(table):
    table({})
    with pytest.raises(ValueError, match=r"op must be one of \['op'\], got 'combine'"):
        look_up("combine", CPU)


def test_register_table_needs_a_fallback():
    with pytest.raises(ValueError, match=r"the launch table of 'op' must have an entry \('any', 'any', 'any'\)"):
        register_table("op", {("sm90", ANY, ANY): DEVICE})


def test_candidates_lists_each_config_once(table):
    table({("sm90", ANY, ANY): DEVICE, ("sm80", ANY, ANY): DEVICE}, candidates=(FALLBACK, BUCKET))
    assert launch.candidates("op") == (FALLBACK, DEVICE, BUCKET)


def test_candidates_are_of_this_version(table):
    table({("sm90", ANY, ANY): BUCKET, ("sm90", "3.6", ANY): DEVICE, ("sm90", "3.8", ANY): VERSION})
    assert launch.candidates("op") == (FALLBACK, DEVICE)


def test_override_holds_for_its_block_alone(table):
    table({})
    with override("op", BUCKET):
        with override("op", DEVICE):
            assert look_up("op", CPU) == DEVICE
        assert look_up("op", CPU) == BUCKET
    assert look_up("op", CPU) == FALLBACK
    with pytest.raises(ValueError, match="got 'combine'"), override("combine", BUCKET):
        pytest.fail("an unknown op must not be overridden")


def test_recording_sees_every_look_up_of_its_block(table):
    table({})
    look_up("op", CPU, "before")
    with recording() as seen:
        look_up("op", CPU, "le64")
    look_up("op", CPU, "after")
    assert seen == [("op", "le64")]


@pytest.mark.parametrize(("size", "bucket"), [(1, "le64"), (64, "le64"), (65, "le512"), (513, "gt512")])
def test_size_bucket_takes_the_first_bound_not_below(size, bucket):
    assert size_bucket(size, (64, 512)) == bucket


def test_device_kind_is_any_without_a_gpu():
    assert launch.device_kind(CPU) == ANY


def test_config_kwargs_are_what_a_launch_takes():
    assert Config({"BLOCK": 8}, num_warps=2, num_stages=3).kwargs() == {"BLOCK": 8, "num_warps": 2, "num_stages": 3}
    assert Config({}, num_warps=2, max_registers=128).kwargs()["maxnreg"] == 128
