"""OpenVINO runs our ONNX files: the same logits, where tokens are dropped too."""

import pytest
import torch

from tests.interop.requirement import needs
from vmoe_torch import routing_stats, set_routing
from vmoe_torch.export import export_program, save_onnx

openvino = needs("openvino")


@pytest.mark.parametrize(("batch_priority", "group_size"), [(True, "image"), (False, "batch")])
def test_openvino_drops_what_the_model_drops(tiny, images, tmp_path, batch_priority, group_size):
    model = tiny(depth=1, moe_layers="every1")
    set_routing(model, capacity_factor=0.5, batch_priority=batch_priority, group_size=group_size)
    program = export_program(model, images, dynamic_batch=group_size == "image")
    save_onnx(program, tmp_path / "model.onnx")
    # On some CPUs it would compute in bfloat16 by itself.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(tmp_path / "model.onnx", "CPU", exact)
    with torch.no_grad():
        wanted = model(images)
    assert routing_stats(model)["blocks.0.mlp"]["dropped"] > 0.2
    torch.testing.assert_close(torch.as_tensor(compiled(images.numpy())[0]), wanted, rtol=0, atol=1e-4)
