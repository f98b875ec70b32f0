"""Figures for papers: PNG and PDF in the evaluation's folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.evaluation.records import Curves
from metaopt.evaluation.statistics import Interval, mean_interval
from metaopt.report import plots
from metaopt.report.looks import Look, looks_of
from metaopt.report.summary import REFERENCE, Evaluation, TaskData, optimizers, standings

# Draws a figure as PNG and PDF at a path without suffix, and returns the paths; [] for no figure.
Drawing = Callable[[Path], list[Path]]
# Field of `Curves` -> what its axis is called, here and on the page.
COSTS = {
    "steps": "optimizer steps",
    "grad_evals": "gradient evaluations",
    "seconds": "seconds",
}


def draw(evaluation: Evaluation, out: Path) -> list[Path]:
    """Draws all figures into the folder `out` and returns their paths."""
    return [path for name, drawn in drawings(evaluation).items() for path in drawn(out / name)]


def drawings(evaluation: Evaluation) -> dict[str, Drawing]:
    """Name of each figure -> the function that draws it."""
    task = evaluation.tasks[0]
    return {
        "comparison": lambda out: _comparison(evaluation, "steps", out),
        "comparison-gradients": lambda out: _comparison(evaluation, "grad_evals", out),
        "aggregate": lambda out: _aggregate(evaluation, out),
        "meta_training": lambda out: _meta_training(evaluation, out),
        **{
            f"mixture-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-') or 'l3rs'}": (
                lambda out, name=name: _mixture(task, name, out)
            )
            for name, curves in task.curves.items()
            if task.record.curves[name].kind == "learned"
            and {"alpha", "lambda_"} <= set(curves.state)
        },
    }


def _comparison(evaluation: Evaluation, cost: str, out: Path) -> list[Path]:
    """Loss against a cost, a panel per task."""
    panels = [_panel(task, cost) for task in evaluation.tasks]
    return plots.curves_figure(panels, _looks(evaluation), out, xlabel=COSTS[cost])


def _aggregate(evaluation: Evaluation, out: Path) -> list[Path]:
    """Speed-ups and final loss ratios over all tasks; no figure where there are none."""
    found = [s for s in standings(evaluation) if s.speedup and s.optimizer != REFERENCE]
    if not found:
        return []
    columns = {
        "speed-up in steps": {s.optimizer: _known(s.speedup) for s in found},
        "speed-up in gradients": {s.optimizer: _known(s.speedup_grads) for s in found},
        "final loss ratio": {s.optimizer: _known(s.ratio) for s in found},
    }
    return plots.standings_figure(columns, _looks(evaluation), out)


def _meta_training(evaluation: Evaluation, out: Path) -> list[Path]:
    """The losses of meta-training; no figure where none are recorded."""
    runs = training_runs(evaluation.index)
    return plots.meta_training_figure(runs, out) if runs else []


def _mixture(task: TaskData, name: str, out: Path) -> list[Path]:
    """lambda and alpha of an L3RS on a task."""
    curves, entry = task.curves[name], task.record.curves[name]
    return plots.mixture_figure(
        curves.windows,
        np.mean(curves.state["lambda_"], axis=0),
        np.mean(curves.state["alpha"], axis=0),
        layer_names(curves, entry.layers),
        base_names(curves, entry.bases),
        out,
    )


def _looks(evaluation: Evaluation) -> dict[str, Look]:
    return looks_of(optimizers(evaluation), [task.curves for task in evaluation.tasks])


def training_runs(index: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """The meta-training curves that are there, as arrays; a gap is NaN."""
    runs = {}
    for name, metrics in index.get("training", {}).items():
        arrays = {key: np.array(values, np.float64) for key, values in metrics.items()}
        if len(arrays.get("step", ())) and np.isfinite(arrays["meta_loss"]).any():
            runs[name] = arrays
    return runs


def layer_names(curves: Curves, given: tuple[str, ...]) -> list[str]:
    """Names of an L3RS's layers, or numbers where the record has none that fit."""
    number = curves.state["lambda_"].shape[2]
    return list(given) if len(given) == number else [f"layer {i}" for i in range(number)]


def base_names(curves: Curves, given: tuple[str, ...]) -> list[str]:
    """Names of an L3RS's base optimizers, or numbers."""
    number = curves.state["alpha"].shape[3]
    return list(given) if len(given) == number else [f"base {i}" for i in range(number)]


def _panel(task: TaskData, cost: str) -> plots.Panel:
    lines = {n: plots.Line(getattr(c, cost), mean_interval(c.loss)) for n, c in task.curves.items()}
    target = lines[REFERENCE].y.mean[-1] if REFERENCE in lines else float("nan")
    return plots.Panel(task.record.title, lines, float(target), f"tuned {REFERENCE} at the end")


def _known(interval: Interval | None) -> Interval:
    return interval or Interval(np.array(np.nan), np.array(np.nan), np.array(np.nan))
