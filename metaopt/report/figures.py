"""Figures for papers, as PNG and PDF in the evaluation's folder. Imports no JAX.

Figures are drawn without pyplot, so that a notebook's plotting backend stays as it is.
"""

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from metaopt.core.checks import printable
from metaopt.core.files import write_whole
from metaopt.evaluation.statistics import Interval, final_mean, mean_interval
from metaopt.report.looks import (
    COLOURS,
    COSTS,
    MANY_LAYERS,
    MOST_PANELS,
    Look,
    choose_looks,
    layer_colours,
    loss_bounds,
    meta_loss_bounds,
    visible_part,
)
from metaopt.report.summary import (
    REFERENCE,
    Evaluation,
    Mixture,
    Standing,
    TaskData,
    mixtures,
    optimizers,
    standings,
    training_runs,
)

SHARED_LEGEND = 10  # with more optimizers, each panel has a legend of its own


class Curve(NamedTuple):
    """A mean curve with its band.

    Attributes:
      x: cost of each measurement.
      y: loss at each measurement, as mean and interval.
    """

    x: Real[np.ndarray, " M"]
    y: Interval


class TaskCurves(NamedTuple):
    """The curves of one task.

    Attributes:
      title: title of the task.
      curves: name of an optimizer -> its curve.
      target: a loss that is marked by a dotted line; NaN for none.
      label: label of that line.
    """

    title: str
    curves: dict[str, Curve]
    target: float = float("nan")
    label: str = ""


def draw(evaluation: Evaluation, out: Path) -> list[Path]:
    """Writes all figures into the folder `out` and returns their paths."""
    return [
        path for name, make in drawings(evaluation).items() for path in save(make(), out / name)
    ]


def drawings(evaluation: Evaluation) -> dict[str, Callable[[], Figure]]:
    """Name of each figure of an evaluation -> the function that draws it."""
    looks = choose_looks(optimizers(evaluation), [task.curves for task in evaluation.tasks])

    def comparison(cost: str) -> Figure:
        panels = [_task_curves(task, cost) for task in evaluation.tasks[:MOST_PANELS]]
        return curves_figure(panels, looks, xlabel=COSTS[cost])

    figures = {
        "comparison": partial(comparison, "steps"),
        "comparison-gradients": partial(comparison, "grad_evals"),
    }
    ranking = [s for s in standings(evaluation) if s.speedup and s.optimizer != REFERENCE]
    if ranking:
        figures["aggregate"] = partial(standings_figure, ranking[: 2 * MOST_PANELS], looks)
    if runs := training_runs(evaluation.index):
        shown = dict(list(runs.items())[:MOST_PANELS])
        figures["meta_training"] = partial(meta_training_figure, shown)
    for mixture in mixtures(evaluation.tasks[0]):
        name = re.sub(r"[^a-z0-9]+", "-", mixture.optimizer.lower()).strip("-")[:80] or "l3rs"
        figures[f"mixture-{name}"] = partial(mixture_figure, mixture)
    return figures


def style() -> Any:  # matplotlib's stubs accept no plain dict
    """Matplotlib settings of all figures, for `matplotlib.rc_context`."""
    return {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "savefig.dpi": 160,
        "svg.fonttype": "none",
    }


def save(figure: Figure, out: Path, formats: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Writes a figure in each of the formats; `out` is the path without a suffix."""
    paths = [out.with_suffix(f".{name}") for name in formats]
    with matplotlib.rc_context(style()):
        for path, name in zip(paths, formats, strict=True):
            picture = io.BytesIO()
            figure.savefig(picture, format=name)
            write_whole(path, picture.getvalue())
    return paths


def curves_figure(
    tasks: Sequence[TaskCurves],
    looks: Mapping[str, Look],
    *,
    xlabel: str = "optimizer steps",
    ylabel: str = "test loss",
) -> Figure:
    """Curves with their bands, one panel per task; a cross marks where a mean leaves the chart."""
    names = [name for name in looks if any(name in task.curves for task in tasks)]
    shared_legend = len(names) <= SHARED_LEGEND or len(tasks) == 1
    if len(tasks) <= 3:
        columns = len(tasks)
    else:
        columns = 3 if shared_legend and len(tasks) > 4 else 2
    with matplotlib.rc_context(style()):
        figure, panels = _panels(
            len(tasks), columns, width=4.4 if shared_legend else 6.6, height=3.3
        )
        for axes, task in zip(panels, tasks, strict=True):
            _draw_curves(axes, task, looks)
            title = textwrap.fill(task.title, 44, break_long_words=False)
            axes.set(title=_plain(title), xlabel=xlabel, ylabel=ylabel)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            if not shared_legend:
                axes.legend(
                    handles=_handles([name for name in names if name in task.curves], looks),
                    loc="center left",
                    bbox_to_anchor=(1.0, 0.5),
                    fontsize=7.5,
                )
        if shared_legend:
            figure.legend(
                handles=_handles(names, looks),
                loc="outside lower center",
                ncols=min(4, len(names)),
            )
    return figure


def _task_curves(task: TaskData, cost: str) -> TaskCurves:
    reference = task.curves.get(REFERENCE)
    return TaskCurves(
        title=task.record.title,
        curves={
            name: Curve(getattr(curves, cost), mean_interval(curves.loss))
            for name, curves in task.curves.items()
        },
        target=float("nan") if reference is None else float(final_mean(reference.loss).mean()),
        label=f"final loss of tuned {REFERENCE}",
    )


def _draw_curves(axes: Axes, task: TaskCurves, looks: Mapping[str, Look]) -> None:
    low, high, logarithmic = loss_bounds(curve.y.mean for curve in task.curves.values())
    axes.set(ylim=(low, high), yscale="log" if logarithmic else "linear")
    for name, curve in task.curves.items():
        colour, dash = looks[name]
        mean, exit_index = visible_part(curve.y.mean)
        axes.plot(curve.x, mean, color=colour, ls=dash, lw=1.6)
        axes.fill_between(
            curve.x,
            np.clip(curve.y.low, low / 10, high * 10),
            np.clip(curve.y.high, low / 10, high * 10),
            where=~np.isnan(mean),
            color=colour,
            alpha=0.15,
            lw=0,
        )
        if exit_index is not None:
            axes.plot(
                curve.x[exit_index],
                mean[exit_index],
                "x",
                color=colour,
                ms=8,
                mew=2.5,
                clip_on=False,
            )
    if np.isfinite(task.target):
        axes.axhline(task.target, color="grey", lw=0.9, ls=":")
        axes.annotate(
            task.label,
            (0.01, task.target),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="top",
            fontsize=7,
            color="grey",
        )


def _handles(names: Sequence[str], looks: Mapping[str, Look]) -> list[Line2D]:
    """Legend entries; the grid of a fallback is left out of a name that stays unique without it."""
    brief = [re.sub(r" \([^()]*\)\)$", ")", name) for name in names]
    labels = [
        brief_name if brief.count(brief_name) == 1 else name
        for name, brief_name in zip(names, brief, strict=True)
    ]
    return [
        Line2D([], [], color=looks[name].colour, ls=looks[name].dash, lw=1.8, label=_plain(label))
        for name, label in zip(names, labels, strict=True)
    ]


def standings_figure(ranking: Sequence[Standing], looks: Mapping[str, Look]) -> Figure:
    """Speed-ups and loss ratios over all tasks with their intervals, one panel each."""
    names = [standing.optimizer for standing in ranking]
    columns = {
        "speed-up in steps": [standing.speedup for standing in ranking],
        "speed-up in gradients": [standing.speedup_grads for standing in ranking],
        "final loss ratio": [standing.ratio for standing in ranking],
    }
    with matplotlib.rc_context(style()):
        figure = Figure(
            figsize=(3.6 * len(columns) + 1.2, 0.32 * len(names) + 1.0), layout="constrained"
        )
        panels = figure.subplots(1, len(columns), sharey=True)
        for axes, (title, intervals) in zip(panels, columns.items(), strict=True):
            means = [float(i.mean) for i in intervals if i and 0 < i.mean < np.inf]
            low, high = 0.5 * min([*means, 1.0]), 2.0 * max([*means, 1.0])
            axes.set(title=title, xscale="log", xlim=(low, high))
            # Few labels, which do not overlap where an optimizer that diverged widens the axis.
            digits = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
            axes.xaxis.set_major_locator(LogLocator(subs=digits, numticks=4))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.axvline(1.0, color="grey", lw=0.9, ls=":")
            for y, (name, interval) in enumerate(zip(names, intervals, strict=True)):
                if interval is None:
                    continue
                mean, left, right = np.clip(interval, low, high)
                axes.plot([left, right], [y, y], color=looks[name].colour, lw=4, alpha=0.35)
                axes.plot(mean, y, "o", color=looks[name].colour, ms=5)
        panels[0].set_yticks(range(len(names)), [_plain(name) for name in names])
        panels[0].invert_yaxis()
    return figure


def meta_training_figure(runs: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Meta-loss per meta-update, one panel per run; dots show the loss on held-out runs."""
    columns = min(len(runs), 2 if len(runs) == 4 else 3)
    with matplotlib.rc_context(style()):
        figure, panels = _panels(len(runs), columns, width=4.2, height=3.0)
        for axes, (name, metrics) in zip(panels, runs.items(), strict=True):
            step, loss = metrics["step"], metrics["meta_loss"]
            axes.plot(step, loss, color=COLOURS[2], lw=1.0, alpha=0.7, label="meta-loss")
            if "validation_loss" in metrics:
                held_out = metrics["validation_loss"]
                axes.plot(step, held_out, "o", ms=3, color=COLOURS[4], label="held-out loss")
            low, high, logarithmic = meta_loss_bounds(metrics)
            axes.set(title=_plain(name), xlabel="meta-updates", ylabel="objective of the inner run")
            axes.set(yscale="log" if logarithmic else "linear", ylim=(low, high))
            axes.legend()
    return figure


def mixture_figure(mixture: Mixture) -> Figure:
    """Step norm lambda and weights alpha of an L3RS during a run, per layer."""
    layers, bases = mixture.layers, mixture.bases[:MOST_PANELS]
    with matplotlib.rc_context(style()):
        figure, panels = _panels(1 + len(bases), 1 + len(bases), width=3.6, height=3.0)
        for index, (layer, colour) in enumerate(
            zip(layers, layer_colours(len(layers)), strict=True)
        ):
            norms, weights = mixture.norms[:, index], mixture.weights[:, index]
            panels[0].plot(mixture.steps, norms, color=colour, label=_plain(layer))
            for p in range(len(bases)):
                panels[1 + p].plot(mixture.steps, weights[:, p], color=colour)
        low, high, logarithmic = loss_bounds(mixture.norms.T)  # a norm may explode with its run
        panels[0].set(title="step norm λ", xlabel="optimizer steps", ylim=(low, high))
        panels[0].set(yscale="log" if logarithmic else "linear")
        if len(layers) <= MANY_LAYERS:
            panels[0].legend(fontsize=7)
        for axes, base in zip(panels[1:], bases, strict=True):
            title = f"weight α of {_plain(base)}"
            axes.set(title=title, xlabel="optimizer steps", ylim=(-0.03, 1.03))
    return figure


def _panels(number: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels in `columns` columns; sizes of a panel in inches."""
    rows = -(-number // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[number:]:
        axes.set_visible(False)
    return figure, grid[:number]


def _plain(text: str) -> str:
    """The text with dollar signs escaped, which would start a formula."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")
