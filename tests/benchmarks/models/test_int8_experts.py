"""The benchmark of int8 experts says what it measured."""

import json

import pytest

from benchmarks.models.int8_experts import FLOAT, VARIANTS, main


def test_results_of_a_tiny_model(tmp_path):
    path = main(["--models", "test_vmoe", "--batches", "1", "2", "--seconds", "0", f"--out={tmp_path}"])
    (found,) = json.loads(path.with_suffix(".json").read_text())["models"]
    assert found["variants"].keys() == VARIANTS.keys()
    floats = found["variants"].pop(FLOAT)
    assert (floats["logit_difference"], floats["same_class"]) == (0, 1)
    assert floats["weights_mb"] == pytest.approx(4e-6 * found["parameters"])
    for each in found["variants"].values():
        assert each["file_mb"] < floats["file_mb"]
        assert each["weights_mb"] < each["file_mb"]
        assert 0 < each["logit_difference"] < 0.05
        assert each["images_per_second"].keys() == {"1", "2"}
    assert found["variants"]["float32, int8 experts"]["layer_mb"] > found["variants"]["bfloat16"]["layer_mb"] == 0
    assert "## test_vmoe" in path.read_text()
