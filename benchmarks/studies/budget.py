"""`set_budget` against every single (K, capacity) that all layers share, on images that it never saw.

    python -m benchmarks.studies.budget runs/mine [--data DIR] [--shares 0.9 0.8 0.7 0.6] [--images 1000]

Calibrates a trained Fashion-MNIST model on some training images, once for every budget of FLOPs, and evaluates what was
chosen, and every global setting in both orders, on all test images. Writes
benchmarks/results/fashion_mnist/budget.{json,md} and docs/figures/budget.png.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.results import RESULTS, command_line, environment, publish
from benchmarks.studies.budget_report import figure, markdown
from benchmarks.studies.fashion_mnist import FIGURES, ROOT
from vmoe_torch.budget import LayerSetting, set_budget
from vmoe_torch.budget.quality import Quality
from vmoe_torch.budget.settings import Assignment, current_settings
from vmoe_torch.commands.images import open_images
from vmoe_torch.commands.sources import Source, open_model
from vmoe_torch.control import routing
from vmoe_torch.data import evaluation_loader
from vmoe_torch.data.sampling import sample

BATCH = 200


def study(source: Source, data: Path, shares: Sequence[float], images: int) -> dict:
    """Calibrates for every share, then measures everything on the test images."""
    model = source.model
    present = current_settings(model)
    train = open_images(source, data, "train")
    calibration = list(_loader(source, sample(train, images)))
    budgets = []
    for share in shares:
        with routing(model):
            budgets.append(set_budget(model, flops=share, data=calibration))
        print(budgets[-1], "\n", flush=True)
    # The same settings were verified for every budget; the order changes no FLOPs.
    alike = {}
    for each in budgets[0].candidates:
        if each.alike and each.name != "present":
            setting = next(iter(each.settings.values()))
            for priority in (True, False):
                alike[LayerSetting(setting.num_selected_experts, setting.eval_capacity_factor, priority)] = each.cost
    settings: list[Assignment] = [
        present,
        *(budget.chosen.settings for budget in budgets),
        *(budget.best_global().settings for budget in budgets),
        *(dict.fromkeys(present, setting) for setting in alike),
    ]
    test = Quality(model, _loader(source, open_images(source, data, "test")), present)
    found = [{"loss": loss, "top1": top1} for loss, top1 in test.of(settings)]
    count = len(budgets)
    return {
        "test_images": test.images,
        "present": {"cost": budgets[0].present.cost, "test": found[0]},
        "budgets": [
            {**budget.as_dict(), "test": own, "best_global": budget.best_global().name, "best_global_test": other}
            for budget, own, other in zip(budgets, found[1 : 1 + count], found[1 + count : 1 + 2 * count])
        ],
        "alike": [
            {"setting": str(setting), "priority": setting.batch_priority, "cost": cost, "test": own}
            for (setting, cost), own in zip(alike.items(), found[1 + 2 * count :])
        ],
    }


def _loader(source: Source, images):
    return evaluation_loader(images, source.transform, BATCH, 0, False)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Runs it, writes the results; returns the path of the Markdown file."""
    parser = command_line(__doc__, RESULTS / "fashion_mnist")
    parser.add_argument("model", metavar="MODEL", help="a run of a Fashion-MNIST recipe")
    parser.add_argument("--data", type=Path, default=ROOT, help="folder of the four IDX files (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6], help="(0.9 0.8 0.7 0.6)")
    parser.add_argument("--images", type=int, default=1000, help="training images to calibrate on (%(default)s)")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of budget.png (%(default)s)")
    options = parser.parse_args(arguments)
    made = environment(torch.device("cpu"))
    source = open_model(options.model)
    results = study(source, options.data, options.shares, options.images)
    path = publish(options.out, "budget", {"environment": made, **results}, lambda _: markdown(results, made))
    options.figures.mkdir(parents=True, exist_ok=True)
    figure(results).savefig(options.figures / "budget.png", dpi=150)
    return path


if __name__ == "__main__":
    main()
