"""vmoe eval and vmoe fewshot on a run: what they print and write, and one line for what a user gets wrong."""

import csv
import json

import pytest

from tests.test_cli import fails
from tests.tiny import small_config
from vmoe_torch.cli import main
from vmoe_torch.commands.images import open_images
from vmoe_torch.commands.sources import open_model
from vmoe_torch.data import evaluation_loader
from vmoe_torch.evaluate import as_rows, evaluate, setting_grid
from vmoe_torch.train import train


def test_eval_is_evaluate_on_a_grid(run_folder, image_folder, tmp_path, capsys):
    grid = ["--capacity=1.05,0.25", "--k=2,1", "--order=vanilla,bpr", "--batch-size=5"]
    data = [str(run_folder), f"--data={image_folder}"]
    assert main(["eval", *data, *grid, f"--out={tmp_path}/x.csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 8
    assert main(["eval", *data, *grid, f"--out={tmp_path}/x.json"]) == 0
    source = open_model(run_folder)
    loader = evaluation_loader(open_images(source, image_folder), source.transform, 5, 0, False)
    want = as_rows(evaluate(source.model, loader, setting_grid([1.05, 0.25], [2, 1])))
    assert json.loads((tmp_path / "x.json").read_text()) == want
    with open(tmp_path / "x.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in want]


def test_eval_takes_dropless_among_capacities(run_folder, image_folder, tmp_path, capsys):
    data = [str(run_folder), f"--data={image_folder}", f"--out={tmp_path}/x.json"]
    assert main(["eval", *data, "--capacity=dropless,0.25", "--order=vanilla"]) == 0
    dropless, short = (line.split() for line in capsys.readouterr().out.splitlines()[2:4])
    assert (dropless[1], dropless[2], short[1]) == ("dropless", "1.000", "0.25")
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["capacity_factor"] for row in rows] == ["dropless", 0.25]
    assert rows[0]["dropped"] == 0 < rows[1]["dropped"]
    with pytest.raises(SystemExit):
        main(["eval", *data, "--capacity=none"])
    assert "--capacity: must be numbers or dropless with commas between, got 'none'" in capsys.readouterr().err


def test_eval_without_settings_takes_the_models(run_folder, image_folder, capsys):
    assert main(["eval", str(run_folder), "--data", str(image_folder)]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["K", "capacity"]
    assert row.split()[:2] == ["-", "-"]


def test_eval_of_a_dense_model(tmp_path, image_folder, capsys):
    config = small_config(tmp_path / "run").override("model.kwargs.moe_layers=[]")
    train(config)
    assert main(["eval", str(tmp_path / "run"), f"--data={image_folder}", f"--out={tmp_path}/x.json"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[2] == "-"
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert (row["actual_capacity_factor"], row["dropped"], row["relative_flops"]) == (None, 0, 1)
    fails(capsys, ["eval", tmp_path / "run", "--data", image_folder, "--k=1"], "MODEL must have MoE layers for --k")
    dense, out = tmp_path / "run", tmp_path / "x.pt2"
    fails(capsys, ["prune", dense, tmp_path / "x.pt", "--average"], "MODEL must have MoE layers to be pruned, got a")
    fails(capsys, ["export", dense, out, "--budget=x.json"], "MODEL must have MoE layers for --budget, got a dense")
    fails(capsys, ["export", dense, out, "--group-size=image"], "MODEL must have MoE layers for --group-size, got a")


def test_fewshot_on_two_data_sets(run_folder, image_folder, tmp_path, capsys):
    data = [f"--data={image_folder}", "--data=fashion_mnist"]
    options = ["--shots=1,3", "--seeds=2", f"--out={tmp_path}/x.json"]
    assert main(["fewshot", str(run_folder), *data, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        [d, n] for d in (str(image_folder), "fashion_mnist") for n in "13"
    ]
    rows = json.loads((tmp_path / "x.json").read_text())
    assert len(rows) == 8
    assert {row["test_images"] for row in rows} == {12, 2000}
    assert max(row["accuracy"] for row in rows if row["test_images"] == 12) > 0.5


def test_classes_of_the_test_images_are_those_of_the_shots(run_folder, image_folder, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train").symlink_to(image_folder / "train")
    (folder / "test").mkdir()
    # Alone, its label would be 0.
    (folder / "test" / "trouser").symlink_to(image_folder / "val" / "trouser")
    assert main(["fewshot", str(run_folder), f"--data={folder}", "--shots=4", f"--out={tmp_path}/x.json"]) == 0
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["accuracy"] > 0.5
    (folder / "test" / "hat").symlink_to(image_folder / "val" / "bag")
    capsys.readouterr()
    fails(capsys, ["fewshot", run_folder, "--data", folder], "must be among the 3 expected, got hat too")


def test_what_a_user_gets_wrong(run_folder, image_folder, tmp_path, capsys):
    model = [run_folder, "--data", image_folder]
    fails(capsys, ["eval", "runs/none", "--data", image_folder], "must be a run folder")
    fails(capsys, ["eval", run_folder, "--data", tmp_path / "none"], "none does not exist")
    fails(capsys, ["eval", *model, "--k=9"], "num_selected_experts must be in 1..num_experts=4, got 9")
    fails(capsys, ["eval", *model, "--batch-size=0"], "--batch-size must be at least 1")
    fails(
        capsys, ["eval", *model, "--out", tmp_path / "none" / "x.csv"], "--out must be a file in a folder that exists"
    )
    fails(capsys, ["fewshot", *model, "--seeds=0"], "--seeds must be at least 1, got 0")
    fails(capsys, ["fewshot", *model, "--shots=0"], "shots must be at least 1, got (0,)")
    fails(capsys, ["fewshot", *model, "--train-split=dev"], "split must be a folder in")
    for wrong in (["eval", "--order=first"], ["eval", "--capacity=much"], ["fewshot", "--shots=1.5"]):
        with pytest.raises(SystemExit, match="2"):
            main([*wrong[:1], "x", "--data=x", *wrong[1:]])
        assert "must be" in capsys.readouterr().err


def test_eval_at_means_and_thresholds(run_folder, image_folder, tmp_path, capsys):
    data = ["eval", str(run_folder), f"--data={image_folder}", f"--out={tmp_path}/x.json"]
    assert main([*data, "--mean=2,1.4", "--capacity=2"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[4:7] == ["mean", "threshold", "selected"]
    full, some = json.loads((tmp_path / "x.json").read_text())
    assert (full["selected_experts"], some["mean_selected_experts"]) == (2, 1.4)
    assert some["selected_experts"] == pytest.approx(1.4, abs=0.05)
    assert some["flops"] < full["flops"]
    assert main([*data, "--threshold=0,0.4"]) == 0
    off, on = json.loads((tmp_path / "x.json").read_text())
    assert (off["selected_experts"], off["gate_threshold"], on["gate_threshold"]) == (2, 0, 0.4)
    assert on["selected_experts"] < 2
    assert off["flops"] == on["flops"]
    capsys.readouterr()
    fails(capsys, [*data, "--threshold=1.5"], "gate_threshold must be None or in 0..1, got 1.5")
    fails(capsys, [*data, "--mean=2.5"], "mean_selected_experts must be above 0 and at most num_selected_experts=2")
    fails(capsys, ["export", run_folder, f"{tmp_path}/x.pt2", "--mean=1.4"], "gate_threshold must be given")
