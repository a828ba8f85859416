"""Our models as parts of others: a tower of open_clip, a backbone of torchvision's detectors, student and teacher."""

import timm
import torch
from torch import nn

from tests.interop.conftest import SIZE
from tests.interop.requirement import needs
from vmoe_torch import moe_layers, routing


def _trained(*models: nn.Module) -> None:
    """Every router and every expert layer has a gradient that is finite and not 0."""
    for model in models:
        layers = moe_layers(model)
        assert layers
        for name, layer in layers.items():
            for part in ("router.weight", "fc1.weight", "fc2.weight"):
                gradient = layer.get_parameter(part).grad
                assert gradient is not None, f"{name}.{part}"
                assert gradient.isfinite().all(), f"{name}.{part}"
                assert gradient.abs().max() > 0, f"{name}.{part}"


def test_open_clip_tower_learns():
    open_clip = needs("open_clip")
    torch.manual_seed(0)
    vision = {"timm_model_name": "test_vmoe", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={**vision, "image_size": 160},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    )
    # The tower is built without arguments of ours: at the model's own size.
    images = torch.randn(2, 3, 160, 160)
    text = torch.randint(1, 32, (2, 8))
    features, words, scale = model(images, text)
    open_clip.ClipLoss()(features, words, scale).backward()
    _trained(model.visual)
    model.eval()
    with routing(model, num_selected_experts=1):
        cheaper = model.encode_image(images)
    assert cheaper.shape == (2, 8)
    assert (cheaper - model.encode_image(images)).abs().max() > 0


class Pyramid(nn.Module):
    """A torchvision FPN over feature maps of one size, as detectors take their backbones."""

    def __init__(self, body: nn.Module, channels: int = 8):
        super().__init__()
        from torchvision.ops import FeaturePyramidNetwork

        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels)
        self.out_channels = channels

    def forward(self, x):
        return self.fpn({str(number): each for number, each in enumerate(self.body(x))})


def _body() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vmoe", **SIZE, features_only=True, out_indices=(0, 1), dynamic_img_size=True)


def test_segmentation_head_on_feature_maps(images):
    backbone = Pyramid(_body())
    maps = backbone(images)
    assert [tuple(each.shape) for each in maps.values()] == [(8, 8, 4, 4)] * 2
    head = nn.Conv2d(8, 3, 1)
    wanted = torch.zeros(8, 16, 16, dtype=torch.long)
    logits = nn.functional.interpolate(head(sum(maps.values())), size=16)
    nn.functional.cross_entropy(logits, wanted).backward()
    _trained(backbone.body)


def test_detector_learns_and_detects():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    detector = FasterRCNN(
        Pyramid(_body()),
        num_classes=3,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,)), ((1.0,),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=2, sampling_ratio=1),
        box_detections_per_img=4,
    )
    target = {"boxes": torch.tensor([[2.0, 2.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.randn(3, 32, 32), torch.randn(3, 24, 32)], [target, target])
    sum(losses.values()).backward()
    _trained(detector.backbone)
    (found,) = detector.eval()([torch.randn(3, 32, 32)])
    assert found["boxes"].shape[1] == 4


def test_distillation_task_trains_a_sparse_student_of_a_dense_teacher(tiny, images, labels):
    from timm.task import LogitDistillationTask

    student, teacher = tiny().train(), timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=5)
    nn.init.normal_(teacher.head.weight)
    task = LogitDistillationTask(
        student_model=student,
        teacher_model=teacher,
        criterion=nn.CrossEntropyLoss(),
        loss_type="kl",
        distill_loss_weight=0.5,
        verbose=False,
    )
    task.train()
    task(images, labels)["loss"].backward()
    _trained(student)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_sparse_teacher_is_read_not_trained(tiny, images, labels):
    from timm.task import LogitDistillationTask

    teacher, student = tiny(), timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=5)
    task = LogitDistillationTask(
        student_model=student, teacher_model=teacher, criterion=nn.CrossEntropyLoss(), loss_type="kl", verbose=False
    )
    task.train()
    task(images, labels)["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.head.weight.grad is not None
