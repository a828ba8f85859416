"""vmoe_torch for scripts that do not import it: `python -m vmoe_torch.run` and the device module of timm's train.py."""

import importlib
import subprocess
import sys

import pytest
from timm.task import ClassificationTask, TrainingTask

import vmoe_torch.run
import vmoe_torch.timm_train

SCRIPT = """
import sys
import timm
import beside
assert __name__ == "__main__"
print(sys.argv[1:], beside.VALUE, timm.is_model("vmoe_s32"))
sys.exit(3)
"""


def test_run_imports_the_models_and_passes_arguments(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("VALUE = 7")
    command = [sys.executable, "-m", "vmoe_torch.run", str(tmp_path / "script.py"), "--model", "vmoe_s32", "-b", "4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "['--model', 'vmoe_s32', '-b', '4'] 7 True\n", result.stderr
    assert result.returncode == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "SCRIPT must be given"), (["absent.py", "-b"], "SCRIPT must be an existing file, got 'absent.py'")],
)
def test_run_without_a_script_is_an_error(arguments, message):
    with pytest.raises(SystemExit, match=message):
        vmoe_torch.run.main(arguments)


def test_timm_train_twice_is_once():
    before = TrainingTask.__call__
    module = importlib.reload(vmoe_torch.timm_train)
    assert TrainingTask.__call__ is module._call is ClassificationTask.__call__
    assert before is not TrainingTask.__call__


def test_timm_train_without_tasks_names_the_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.task", None)
    monkeypatch.delitem(sys.modules, "vmoe_torch.timm_train")
    with pytest.raises(ImportError, match=r"needs timm.task, the training tasks of timm >= 1.0.23, got timm \d"):
        importlib.import_module("vmoe_torch.timm_train")
