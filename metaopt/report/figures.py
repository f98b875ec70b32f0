"""Figures for papers: PNG and PDF in the evaluation's folder."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.evaluation.records import Curves
from metaopt.evaluation.statistics import Interval, final_mean, mean_interval
from metaopt.report import plots
from metaopt.report.looks import looks_of
from metaopt.report.summary import REFERENCE, Evaluation, TaskData, optimizers, standings

# Field of `Curves` -> what its axis is called, here and on the page.
COSTS = {
    "steps": "optimizer steps",
    "grad_evals": "gradient evaluations",
    "seconds": "seconds",
}


def draw(evaluation: Evaluation, out: Path) -> list[Path]:
    """Writes all figures into the folder `out` and returns their paths."""
    looks = looks_of(optimizers(evaluation), [task.curves for task in evaluation.tasks])
    paths = []
    for cost, name in (("steps", "comparison"), ("grad_evals", "comparison-gradients")):
        panels = [_panel(task, cost) for task in evaluation.tasks]
        paths += plots.curves_figure(panels, looks, out / name, xlabel=COSTS[cost])
    found = [s for s in standings(evaluation) if s.speedup and s.optimizer != REFERENCE]
    if found:
        aggregates = {
            "speed-up in steps": {s.optimizer: _known(s.speedup) for s in found},
            "speed-up in gradients": {s.optimizer: _known(s.speedup_grads) for s in found},
            "final loss ratio": {s.optimizer: _known(s.ratio) for s in found},
        }
        paths += plots.standings_figure(aggregates, looks, out / "aggregate")
    if training := training_runs(evaluation.index):
        paths += plots.meta_training_figure(training, out / "meta_training")
    return paths + _mixtures(evaluation.tasks[0], out)


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
    reference = task.curves.get(REFERENCE)
    target = float("nan") if reference is None else float(final_mean(reference.loss).mean())
    return plots.Panel(task.record.title, lines, target, f"tuned {REFERENCE} at the end")


def _known(interval: Interval | None) -> Interval:
    return interval or Interval(np.array(np.nan), np.array(np.nan), np.array(np.nan))


def _mixtures(task: TaskData, out: Path) -> list[Path]:
    """lambda and alpha of every L3RS on the first task of the suite."""
    paths = []
    for name, curves in task.curves.items():
        entry = task.record.curves[name]
        if entry.kind == "learned" and {"alpha", "lambda_"} <= set(curves.state):
            paths += plots.mixture_figure(
                curves.windows,
                np.mean(curves.state["lambda_"], axis=0),
                np.mean(curves.state["alpha"], axis=0),
                layer_names(curves, entry.layers),
                base_names(curves, entry.bases),
                out / f"mixture-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-') or 'l3rs'}",
            )
    return paths
