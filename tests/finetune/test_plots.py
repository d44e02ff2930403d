"""Plots are PNG files of something, whatever the names are, and leave pyplot alone."""

import subprocess
import sys

import pytest
from matplotlib.image import imread

from fastft.finetune import UserError, plots

HISTORY = [
    {"loss": 2.0, "learning_rate": 1e-3, "step": 1},
    {"loss": 1.0, "learning_rate": 5e-4, "step": 2},
    {"eval_loss": 1.5, "eval_accuracy": 0.4, "eval_runtime": 3.0, "step": 2},
    {"train_runtime": 5.0, "step": 2},
]
NAMES = [r"$\frac$", "_plain"]  # broken mathematics, and a name that legends leave out
TRIALS = [
    {"trial": 0, "score": 0.5, "state": "complete"},
    {"trial": 1, "score": None, "state": "pruned"},
]
DRAWN = {
    "curves": lambda path: plots.curves(HISTORY, path),
    "curves of nothing": lambda path: plots.curves([], path),
    "confusion": lambda path: plots.confusion([[5, 1], [0, 0]], NAMES, path),
    "forgetting": lambda path: plots.forgetting([[0.9, float("nan")], [0.7, 0.8]], NAMES, path),
    "history": lambda path: plots.history(TRIALS, "f1_macro", True, path),
    "importance": lambda path: plots.importance(dict.fromkeys(NAMES, 0.5), path),
}


@pytest.mark.parametrize("name", DRAWN)
def test_is_a_picture(name, tmp_path):
    DRAWN[name](tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").std() > 0.01


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        plots.curves(HISTORY, tmp_path / "nowhere" / "plot.png")


def test_pyplot_stays_out(tmp_path):
    code = (
        "import sys; from fastft.finetune import plots\n"
        f"plots.confusion([[1]], ['a'], {str(tmp_path / 'plot.png')!r})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
