"""What the study found, in tables and in words."""

from collections.abc import Sequence

from benchmarks.harness.results import heading
from benchmarks.studies.motion import runs
from benchmarks.studies.motion.draw import MOTIONS
from benchmarks.studies.motion.formula import registered_table


def markdown(content: dict) -> list[str]:
    """The results file: all that the finished runs allow, and the registered models."""
    found = content["runs"]
    lines = heading("Which way did it move?", content["environment"])
    lines += [line for table in (quality, by_motion, capacity, cost) for line in table(found)]
    lines += ["The registered models, clips of 16 frames of 224 x 224 pixels, 400 classes:", ""]
    return [*lines, *registered_table(content["registered"])]


def run_of(found: Sequence[dict], name: str) -> dict | None:
    """A finished run, None where it is not."""
    return next((run for run in found if run["name"] == name), None)


def setting(run: dict, factor: float, priority: bool) -> dict:
    """What was measured at a capacity."""
    return next(
        row for row in run["capacities"] if (row["capacity_factor"], row["batch_priority"]) == (factor, priority)
    )


def percent(share: float) -> str:
    """With one digit."""
    return f"{100 * share:.1f}"


def quality(found: Sequence[dict]) -> list[str]:
    """All models: what they tell apart."""
    if not found:
        return []
    lines = [
        f"Drawn characters ({runs.CHARACTERS}) that move, turn, grow or are revealed, each forwards and backwards: "
        f"{len(MOTIONS)} motions, {len(MOTIONS) * len(runs.CHARACTERS)} classes.",
        f"Clips of {runs.FRAMES} frames of {runs.SIDE} x {runs.SIDE} pixels, trained on DejaVu, tested on Computer "
        "Modern. A motion and its pair, the same backwards, have the same frames.",
        "Per cent of the test clips: class is motion and character; pair, the motion or the same backwards; direction, "
        f"which of these two is likelier (chance 50); unseen letters are {runs.UNSEEN_CHARACTERS}. Patches are served "
        "by priority (BPR).",
        "",
        "| model | class | motion | pair | direction | motion, unseen letters |",
        "| --- " * 6 + "|",
    ]
    for run in found:
        cells = [percent(run["test"][key]) for key in ("class", "motion", "pair", "direction")]
        lines.append(f"| {' | '.join([run['title'], *cells, percent(run['unseen']['motion'])])} |")
    lines.append("")
    video, frames = run_of(found, "video"), run_of(found, "frames")
    if video and frames:
        better = 100 * (video["test"]["motion"] - frames["test"]["motion"])
        lines += [
            f"The video V-MoE tells {better:+.1f} points more motions right than its frame-by-frame image model, whose "
            f"direction is right for {percent(frames['test']['direction'])} % (the video model's: "
            f"{percent(video['test']['direction'])} %).",
            "",
        ]
    return lines


def cost(found: Sequence[dict]) -> list[str]:
    """All models: what they are and what they took."""
    head = ("model", "parameters, M", "by the formula", "MFLOPs of a clip", "by the formula", "clips trained on")
    head += ("training TFLOPs", "processor minutes")
    lines = ["What they cost; times are of one busy core:", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for run in found:
        cells = [f"{run[key] / 1e6:.3f}" for key in ("parameters", "formula_parameters")]
        cells += [f"{run[key] / 1e6:.2f}" for key in ("flops", "formula_flops")]
        cells += [f"{run['clips']:,}", f"{run['training_flops'] / 1e12:.1f}", f"{run['training_seconds'] / 60:.1f}"]
        lines.append(f"| {' | '.join([run['title'], *cells])} |")
    return [*lines, ""] if found else []


def by_motion(found: Sequence[dict]) -> list[str]:
    """The motions, one by one."""
    if not found:
        return []
    lines = ["Motions told right, per cent of the clips of each:", ""]
    lines += [f"| motion | {' | '.join(run['title'] for run in found)} |", "| --- " * (len(found) + 1) + "|"]
    for number, motion in enumerate(MOTIONS):
        lines.append(f"| {motion} | {' | '.join(percent(run['test']['by_motion'][number]) for run in found)} |")
    return [*lines, ""]


def capacity(found: Sequence[dict]) -> list[str]:
    """The video V-MoE with less and less capacity, vanilla and BPR."""
    video, dense = run_of(found, "video"), run_of(found, "dense")
    if video is None or dense is None:
        return []
    lines = [
        "The video V-MoE with less capacity, its weights as trained; a clip is a group, so all its patches of all "
        "frames compete for the slots:",
        "",
        "| capacity | of the dense FLOPs | class, vanilla | class, BPR | motion, vanilla | motion, BPR |",
        "| --- " * 6 + "|",
    ]
    for factor in dict.fromkeys(row["capacity_factor"] for row in video["capacities"]):
        pair = [setting(video, factor, priority) for priority in (False, True)]
        cells = [percent(row[key]) for key in ("class", "motion") for row in pair]
        lines.append(f"| {factor:g} | {pair[0]['flops'] / dense['flops']:.2f} | {' | '.join(cells)} |")
    full = max(row["capacity_factor"] for row in video["capacities"])
    lost = [
        f"{100 * (setting(video, 0.5, priority)['motion'] - setting(video, full, priority)['motion']):+.1f}"
        for priority in (False, True)
    ]
    return [
        *lines,
        "",
        f"At half the capacity BPR changes the accuracy of motions by {lost[1]} points, vanilla by {lost[0]}.",
        "",
    ]
