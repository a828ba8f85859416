"""Where a package of the extra `export` is missing, the error says what to install."""

import sys

import pytest

from vmoe_torch.export.census import count_experts
from vmoe_torch.export.check import check_file
from vmoe_torch.export.onnx_file import save_onnx


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("onnx", lambda: count_experts("x.onnx", None)),
        ("onnxruntime", lambda: check_file("x.onnx", None, (1, 3, 8, 8))),
        ("onnxscript", lambda: save_onnx(None, "x.onnx")),
    ],
)
def test_missing_package_is_named(monkeypatch, name, call):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"ONNX needs pip install -e '\.\[export\]' from a clone .*, got .*{name}"):
        call()
