"""What the study of budgets found: the tables and the figure."""

from matplotlib.figure import Figure

from benchmarks.harness.results import heading
from vmoe_torch.budget import LayerSetting

COLOURS = {True: "#0072B2", False: "#D55E00"}
# The figure shows losses up to this multiple of the trained model's: beyond it nobody would use the model.
ABOVE = 1.25
NAMES = {True: "one setting for all layers, BPR", False: "one setting for all layers, vanilla"}


def markdown(results: dict, made: dict[str, str]) -> list[str]:
    """The results file."""
    present, budgets = results["present"], results["budgets"]
    lines = heading("Fashion-MNIST: a setting for each layer, or one for all", made)
    lines += [
        f"Calibrated on {budgets[0]['images']:,} training images with labels, measured on all "
        f"{results['test_images']:,} test images. As trained: {_mega(present['cost'])} MFLOPs, "
        f"top-1 {_percent(present['test'])} %, loss {present['test']['loss']:.4f}.",
        "",
        "`set_budget` and the best single setting of its calibration saw the same images. The best of the test is the "
        "single setting within the budget that looks best on the test images themselves, in top-1 and in loss each: "
        "nobody can choose it, and it is a little too good by chance.",
        "",
        "| budget | `set_budget`: cost | top-1 % | loss | best single setting: cost | top-1 % | loss "
        "| best of the test: top-1 % | loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for budget in budgets:
        within = [each["test"] for each in results["alike"] if each["cost"] <= budget["limit"]]
        single = next(each for each in budget["candidates"] if each["name"] == budget["best_global"])
        other = budget["best_global_test"]
        lines.append(
            f"| {budget['share']:g} | {budget['chosen']['cost'] / present['cost']:.3f} "
            f"| {_percent(budget['test'])} | {budget['test']['loss']:.4f} "
            f"| {single['cost'] / present['cost']:.3f} ({single['name'].removeprefix('all layers ')}) "
            f"| {_percent(other)} | {other['loss']:.4f} "
            f"| {max(100 * each['top1'] for each in within):.2f} | {min(each['loss'] for each in within):.4f} |"
        )
    lines += ["", *sentences(results)]
    lines += ["", "What `set_budget` chose:", "", "| budget | layer | setting |", "| --- | --- | --- |"]
    for budget in budgets:
        for layer, setting in budget["chosen"]["settings"].items():
            lines.append(f"| {budget['share']:g} | {layer} | {LayerSetting(**setting)} |")
    lines += ["", "Predicted on the calibration images, measured on them, measured on the test images:", ""]
    lines += ["| budget | predicted loss | measured loss | test loss | measured top-1 % | test top-1 % |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for budget in budgets:
        chosen = budget["chosen"]
        lines.append(
            f"| {budget['share']:g} | {chosen['predicted_loss']:.4f} | {chosen['loss']:.4f} "
            f"| {budget['test']['loss']:.4f} | {_percent(chosen)} | {_percent(budget['test'])} |"
        )
    lines += ["", "Every single setting:", "", "| setting | cost | top-1 % | loss |", "| --- | --- | --- | --- |"]
    for each in results["alike"]:
        lines.append(
            f"| {each['setting']} | {each['cost'] / present['cost']:.3f} | {_percent(each['test'])} "
            f"| {each['test']['loss']:.4f} |"
        )
    return [*lines, "", "![Loss against FLOPs](../../../docs/figures/budget.png)"]


def sentences(results: dict) -> list[str]:
    """What the numbers show, budget by budget, whichever way they fall."""
    lines = []
    for budget in results["budgets"]:
        within = [each["test"] for each in results["alike"] if each["cost"] <= budget["limit"]]
        best = {"top1": max(each["top1"] for each in within), "loss": min(each["loss"] for each in within)}
        against = []
        for name, other in (("the best single setting", budget["best_global_test"]), ("the best of the test", best)):
            points = 100 * (budget["test"]["top1"] - other["top1"])
            loss = budget["test"]["loss"] - other["loss"]
            against.append(f"{points:+.2f} points of top-1 and {loss:+.4f} of loss against {name}")
        lines.append(f"- Budget {budget['share']:g}: {', '.join(against)}.")
    image = 100 / results["test_images"]
    return [*lines, "", f"One model, one draw of calibration images; {image:g} points are one image."]


def _mega(flops: float) -> str:
    return f"{flops / 1e6:.2f}"


def _percent(quality: dict) -> str:
    return f"{100 * quality['top1']:.2f}"


def figure(results: dict) -> Figure:
    """Test loss against cost near the budgets: every single setting, and what set_budget chose."""
    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.subplots()
    present = results["present"]
    top = ABOVE * present["test"]["loss"]
    for priority, colour in COLOURS.items():
        own = [each for each in results["alike"] if each["priority"] == priority and each["test"]["loss"] < top]
        axes.plot(
            [100 * each["cost"] / present["cost"] for each in own],
            [each["test"]["loss"] for each in own],
            "o" if priority else "^",
            color=colour,
            markersize=6,
            label=NAMES[priority],
        )
    axes.plot(
        [100 * each["chosen"]["cost"] / present["cost"] for each in results["budgets"]],
        [each["test"]["loss"] for each in results["budgets"]],
        "*",
        color="black",
        markersize=11,
        label="set_budget, a setting for each layer",
    )
    axes.axhline(present["test"]["loss"], color="#6E6E6E", linewidth=1, linestyle="--", label="as trained")
    axes.set_xlabel("FLOPs per image, % of the model as trained")
    axes.set_ylabel("loss on the test images, nats (lower is better)")
    axes.set_title(
        f"Fashion-MNIST, {results['test_images']:,} test images: the same weights at less compute\n"
        f"(settings of at most {ABOVE:g} times the loss as trained)",
        fontsize=11,
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn
