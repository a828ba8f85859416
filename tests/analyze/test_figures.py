"""Figures show the numbers they are given, under their names."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vmoe_torch.analyze import (
    Ablation,
    LayerRouting,
    capacity_curve,
    expert_by_class,
    expert_by_position,
    expert_loads,
    gates_by_depth,
    kept_patches_animation,
    kept_patches_grid,
    router_ablation,
    selected_experts_curve,
)
from vmoe_torch.analyze.heatmaps import NAMED_CLASSES
from vmoe_torch.analyze.patches import pictures_of
from vmoe_torch.evaluate import Evaluation, Flops, RoutingSetting
from vmoe_torch.report.style import flops_unit, layer_label, shorten


def test_capacity_curve_draws_every_evaluation(evaluations):
    for against, find in (("capacity", lambda e: e.capacity_factor), ("flops", lambda e: e.flops.total / 1e6)):
        (axes,) = capacity_curve(evaluations, against).axes
        drawn = {
            (line.get_label(), round(x, 6), round(y, 6)) for line in axes.lines for x, y in line.get_xydata().tolist()
        }
        order = {False: "vanilla", True: "BPR"}
        assert drawn == {
            (
                f"{order[e.setting.batch_priority]}, K={e.setting.num_selected_experts}",
                round(find(e), 6),
                round(100 * e.top1, 6),
            )
            for e in evaluations
        }
        assert axes.get_xlabel()
        assert axes.get_title()
    with pytest.raises(ValueError, match="against must be 'capacity' or 'flops', got 'time'"):
        capacity_curve(evaluations, "time")


def test_capacity_curve_does_not_blow_up_small_differences(evaluations):
    low, high = capacity_curve(evaluations[-2:-1]).axes[0].get_ylim()
    assert high - low == pytest.approx(5.0)
    low, high = capacity_curve(evaluations).axes[0].get_ylim()
    assert low < 100 * min(e.top1 for e in evaluations)
    assert high > 100 * max(e.top1 for e in evaluations)


def test_capacity_curve_has_a_dense_line_only_if_given(evaluations):
    dense = Evaluation(RoutingSetting(), 100, 0.7, 1.0, 0.5, float("nan"), 0.0, 0.0, Flops(3e6, 3e6))
    for against, points in (("capacity", 0), ("flops", 1)):
        lines = capacity_curve(evaluations, against, dense, "vit").axes[0].lines
        (level,) = [line for line in lines if line.get_label() == "vit"]
        assert list(level.get_ydata()) == [70.0, 70.0]
        assert [line.get_xydata().tolist() for line in lines if line.get_marker() == "*"] == [[[3.0, 70.0]]] * points
    assert "vit" not in [line.get_label() for line in capacity_curve(evaluations).axes[0].lines]


def test_expert_by_class_shows_the_shares_under_their_names(routing):
    axes = expert_by_class(routing, ["a", "b", "c", "empty"], "layer").axes[0]
    table = axes.images[0].get_array()
    classes = [label.get_text() for label in axes.get_xticklabels()]
    experts = [label.get_text() for label in axes.get_yticklabels()]
    assert table[experts.index("expert 1"), classes.index("a")] == pytest.approx(90.0)
    assert table[experts.index("expert 0"), classes.index("b")] == pytest.approx(80.0)
    # A class without images has no column.
    assert sorted(classes) == ["a", "b", "c"]
    # Classes that use the same experts stand side by side.
    assert abs(classes.index("a") - classes.index("c")) == 1


def test_expert_by_class_survives_counts_without_structure():
    kept = torch.ones(3, 2, dtype=torch.int64)
    axes = expert_by_class(LayerRouting(kept, kept, torch.ones(1, 2)), ["a", "b", "c"], "layer").axes[0]
    assert (axes.images[0].get_array() == 50.0).all()


def test_kept_patches_grid_hides_dropped_patches_only():
    pictures = torch.rand(2, 4, 6)
    kept = torch.tensor([[[1, 0, 2], [0, 0, 1]], [[0, 0, 0], [2, 2, 2]]])
    canvas = kept_patches_grid(pictures, [("C = 1", kept)], ["a", "b"], "title")
    shown = [torch.as_tensor(image.get_array()) for image in canvas.axes[0].images]
    for number in range(2):
        assert torch.equal(shown[number], pictures[number].unsqueeze(-1).expand(-1, -1, 3))
        for row in range(4):
            for column in range(6):
                same = torch.equal(shown[2 + number][row, column], shown[number][row, column])
                assert same == bool(kept[number, row // 2, column // 2] > 0)


def test_expert_by_class_shows_many_classes_whole_and_the_most_specialised_by_name():
    generator = torch.Generator().manual_seed(0)
    kept = torch.randint(10, 13, (300, 40), generator=generator)
    # Every tenth class goes to one expert alone.
    kept[::10] = 0
    kept[torch.arange(0, 300, 10), torch.arange(30)] = 400
    canvas = expert_by_class(LayerRouting(kept, kept, torch.ones(1, 2)), [f"class {c}" for c in range(300)], "layer")
    whole, named = canvas.axes[:2]
    assert whole.images[0].get_array().shape == (40, 300)
    names = [label.get_text() for label in named.get_xticklabels()]
    assert len(names) == NAMED_CLASSES == named.images[0].get_array().shape[1]
    assert all(int(name.removeprefix("class ")) % 10 == 0 for name in names)
    assert whole.get_xlabel() == "300 classes"
    # Small enough for a page, and large enough for forty names.
    width, height = canvas.get_size_inches()
    assert 8 < width < 15
    assert 12 < height < 22


def test_expert_by_position_shows_each_expert_its_places(routing):
    axes = expert_by_position(routing, "blocks.1.mlp").axes[0]
    shown = [image.get_array() for image in axes.images]
    assert len(shown) == 3
    assert shown[0][0].tolist() == pytest.approx([90.0, 30.0])
    assert shown[2][1, 1] == pytest.approx(50.0)
    # Nothing was counted there.
    assert all(np.ma.getmaskarray(table)[1, 0] for table in shown)
    assert "block 1" in axes.get_title()
    routing.positions = None
    with pytest.raises(ValueError, match=r"routing of blocks.1.mlp must have positions, got none"):
        expert_by_position(routing, "blocks.1.mlp")


def test_expert_loads_stack_what_is_dropped_on_what_is_kept(routing):
    axes = expert_loads({"blocks.1.mlp": routing, "blocks.3.mlp": routing}).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    wanted = routing.wanted.sum(0)
    balanced = float(wanted.sum()) / 3
    assert heights[:3] == pytest.approx((routing.kept.sum(0) / balanced).tolist())
    assert heights[3:] == pytest.approx([4 / balanced] * 3)
    assert axes.get_title() == f"block 1: {1200 / 42:.1f}% dropped"


def test_gates_by_depth_have_a_half_for_each_choice(routing):
    axes = gates_by_depth({"blocks.1.mlp": routing, "blocks.3.mlp": routing}).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["block 1", "block 3"]
    assert len(axes.collections) == 4
    first = axes.collections[0].get_paths()[0].vertices
    # The widest bin of the first choice is the last third, drawn to the left.
    assert first[first[:, 0].argmin(), 1] >= 2 / 3 - 1e-9
    medians = [line.get_ydata()[0] for line in axes.lines]
    assert medians[:2] == pytest.approx(routing.gate_quantiles(0.5)[:, 0].tolist())


def test_curve_over_experts_per_token_marks_the_models_own(evaluations):
    line = [e for e in evaluations if e.capacity_factor == 1.0 and e.setting.batch_priority]
    axes = selected_experts_curve(line, 2).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 80.0], [2.0, 80.0]]
    assert axes.lines[1].get_xydata().tolist() == [[2.0, 80.0]]
    assert [text.get_text() for text in axes.texts] == ["2.000", "3.000"]
    assert "MFLOPs" in axes.get_xlabel()


def test_router_ablation_has_a_point_for_every_layer_and_for_all():
    names = ("blocks.1.mlp", "blocks.3.mlp")
    found = [
        Ablation(layers, 10, top1, 1.0)
        for layers, top1 in (((), 0.9), (names[:1], 0.8), (names[1:], 0.6), (names, 0.1))
    ]
    axes = router_ablation(found, chance=0.2).axes[0]
    points = next(collection for collection in axes.collections if len(collection.get_offsets()) == 3)
    assert points.get_offsets().tolist() == [[0.0, 80.0], [1.0, 60.0], [2.0, 10.0]]
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
    assert levels == {"trained routers everywhere": 90.0, "guessing": 20.0}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["block 1", "block 3", "all 2"]
    assert axes.get_ylim()[0] >= -1


def test_animation_hides_what_is_not_kept(patches):
    with Image.open(io.BytesIO(kept_patches_animation(patches, "layer", "title"))) as gif:
        assert gif.n_frames == 2
        assert gif.info["loop"] == 0
        seen = []
        for frame in range(2):
            gif.seek(frame)
            seen.append(np.asarray(gif.convert("RGB")).astype(int))
    assert tuple(seen[0][0, 0]) == (255, 255, 255)
    hidden = [(abs(frame - np.array([178, 204, 237])).max(2) < 6).sum() for frame in seen]
    # 6 patches an image, 104 pixels by 69 an image: one row of two images whole, the other with 1 patch of 6.
    assert hidden[0] == 0
    assert hidden[1] == pytest.approx(104 * 69 * (1 + 2 * 5 / 6), rel=0.02)


def test_words_for_people():
    assert layer_label("blocks.11.mlp") == "block 11"
    assert layer_label("blocks.5.mlp.members.1") == "block 5, member 1"
    assert layer_label("encoder.moe") == "encoder.moe"
    assert shorten("abc", 3) == "abc"
    assert shorten("abcd", 3) == "ab…"
    assert [flops_unit(number)[1] for number in (3e5, 2e6, 1e9, 5e13)] == ["kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs"]


def test_pictures_are_the_images_before_their_normalisation():
    image = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
    transform = create_transform((3, 6, 8), crop_pct=1.0, mean=(0.2, 0.4, 0.6), std=(0.3, 0.2, 0.1))
    (picture,) = pictures_of(transform(image).unsqueeze(0), transform)
    torch.testing.assert_close(picture, torch.from_numpy(np.array(image)) / 255)
    # Of a transform that does not tell, the darkest is black and the lightest white.
    (grey,) = pictures_of(torch.tensor([[[[-3.0, 1.0], [0.0, 5.0]]]]), lambda image: image)
    torch.testing.assert_close(grey, torch.tensor([[0.0, 0.5], [0.375, 1.0]]))
