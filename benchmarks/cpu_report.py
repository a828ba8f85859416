"""The report of a machine without a GPU: the MoE layer, how its cost grows, processes, training steps and models."""

import json
from pathlib import Path

import torch

from benchmarks.harness import bars, plots
from benchmarks.harness.protocol import exponent
from benchmarks.harness.results import from_dicts, limit_table, machine_name, report_heading, table, write
from benchmarks.harness.session import Session
from benchmarks.layer import on_cpu
from benchmarks.models import speed, train_step

CPU = torch.device("cpu")
# The layer's own benchmark comes first and is left out here. Models are last, since compiling takes longest.
SHARES = (("models.scaling", 0.25), ("models.ranks", 0.15), ("models.train_step", 0.15), ("models.speed", 0.45))
LAYER_SHARE = 0.15
SECONDS_PER_VARIANT = 3.0
MODEL_OPS = (speed.OP, train_step.OP)


def run(results: Path, seconds: float) -> int:
    """Measures for about so many seconds and writes results/<cpu>/{layer_on_cpu,report}.{json,md} and plots."""
    folder = results / machine_name(CPU)
    threads = str(torch.get_num_threads())
    path = on_cpu.main(["--out", str(results), "--seconds", str(LAYER_SHARE * seconds), "--threads", threads])
    layer = json.loads(path.with_suffix(".json").read_text())
    session = Session(
        CPU,
        torch.float32,
        # The layer's checks and warm-up take as long again as a third of its timed runs.
        seconds=seconds * (1.0 - 1.33 * LAYER_SHARE),
        seconds_per_variant=SECONDS_PER_VARIANT,
        on_row=lambda session: write_report(session, layer, folder),
    )
    session.run_all(SHARES)
    path = write_report(session, layer, folder, complete=True)
    print(path.read_text())
    print(f"written to {path}")
    return 0


def write_report(session: Session, layer: dict, folder: Path, complete: bool = False) -> Path:
    """Writes what there is so far; `layer` is the content of layer_on_cpu.json."""
    if complete:
        plots.write_plots(session, from_dicts(layer["rows"]), folder)
    content = {
        **session.content([bar.result(session) for bar in bars.CPU_BARS], complete),
        "layer_bars": layer["bars"],
        "models": models(session),
        "exponents": exponents(session),
    }
    return write(folder, "report", content, markdown(content))


def markdown(content: dict) -> list[str]:
    """The results file."""
    return [
        *report_heading("V-MoE on a CPU, float32, measured", content),
        "Medians of interleaved runs with 20% and 80% quantiles; ratios are taken within a round. Every number stands",
        "behind a check in the same run: layers and models agree with the eager reference, compiled models with eager",
        "ones, spread experts with experts at home. The worst case counts.",
        "",
        *bars.lines(content["bars"]),
        "",
        "The MoE layer ([layer_on_cpu.md](layer_on_cpu.md)):",
        "",
        *limit_table(content["layer_bars"]),
        "",
        *(line for name in content["pictures"] for line in (f"![{name.removesuffix('.png')}]({name})", "")),
        *model_lines(content["models"]),
        *(f"- {note}" for note in content["notes"]),
        "",
        *table(content["rows"]),
    ]


def exponents(session: Session) -> dict[str, dict[str, float]]:
    """Of the layer's time over what varies, with the 20% and 80% quantiles of the rounds."""
    fits = {name: exponent(sweep) for name, sweep in session.sweeps.items() if len(sweep) > 1}
    return {
        name: {"median": fit.median, "low": fit.quantile(0.2), "high": fit.quantile(0.8)} for name, fit in fits.items()
    }


def models(session: Session) -> list[dict]:
    """Images per second of every model, and its rate over the dense one's with the quantiles of the rounds."""
    found = []
    for (op, direction, case, variant), samples in session.samples.items():
        if op in MODEL_OPS:
            over = session.samples[op, direction, case, "dense"].over(samples)
            images = int(case.split()[0].removeprefix("B="))
            found.append(
                {
                    "what": f"{op} {direction} {case}",
                    "model": variant,
                    "images_per_second": images / samples.median,
                    "over_dense": over.median,
                    "low": over.quantile(0.2),
                    "high": over.quantile(0.8),
                }
            )
    return found


def model_lines(found: list[dict]) -> list[str]:
    """Markdown lines, one per model; none where nothing was measured."""
    if not found:
        return []
    lines = ["| what | model | images/s | over dense (20%..80%) |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {each['what']} | {each['model']} | {each['images_per_second']:.1f} "
        f"| {each['over_dense']:.3f} ({each['low']:.3f}..{each['high']:.3f}) |"
        for each in found
    ]
    return [*lines, ""]
