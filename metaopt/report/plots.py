"""Summaries of records -> figures for papers. Imports no JAX."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from metaopt.evaluation.statistics import Interval

# Okabe-Ito: told apart by colour-blind readers and in grey print.
COLOURS = ("#8C8C8C", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
SHARED_LEGEND = 10  # of more optimizers, every panel has a legend of its own
OFF_CHART = 1e3  # a mean above this multiple of its start is not drawn
MANY_LAYERS = 8  # more are coloured by depth, without a legend


class Line(NamedTuple):
    """A curve with its band. Attributes: x: ``[W]``; y: mean, low, high, each ``[W]``."""

    x: np.ndarray
    y: Interval


class Panel(NamedTuple):
    """Attributes: title; lines: by optimizer; target: a loss to mark, NaN for none; its label."""

    title: str
    lines: dict[str, Line]
    target: float = float("nan")
    label: str = ""


def style() -> Any:
    """One look for all figures."""
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


def shades(number: int) -> list[str]:
    """From dark to bright, all of them visible on white and on black."""
    return [to_hex(shade) for shade in plt.get_cmap("viridis")(np.linspace(0.2, 0.9, number))]


def layer_colours(number: int) -> list[str]:
    """A colour per layer; of many layers, by depth from dark to bright."""
    return list(COLOURS[:number]) if number <= MANY_LAYERS else shades(number)


def on_chart(mean: np.ndarray) -> tuple[np.ndarray, int | None]:
    """The part of a mean curve that can be drawn, and where it left the chart for good.

    Points that are not finite or above `OFF_CHART` x the start become NaN. The second value is the
    index of the last point before the curve left without coming back: a cross is drawn there.
    """
    mean = np.asarray(mean, np.float64)
    finite = np.isfinite(mean)
    start = mean[0] if finite[0] and mean[0] > 0 else 1.0
    drawn = finite & (np.where(finite, mean, 0.0) <= OFF_CHART * start)
    if drawn[-1] or not drawn.any():
        return np.where(drawn, mean, np.nan), None
    return np.where(drawn, mean, np.nan), int(np.flatnonzero(drawn)[-1])


def loss_bounds(means: Iterable[np.ndarray]) -> tuple[float, float, bool]:
    """(low, high, logarithmic) for the axis of the means: no run that blew up squeezes the others.

    The axis is linear where a mean is negative, or none is positive.
    """
    drawn = [on_chart(mean)[0] for mean in means]
    values = np.concatenate([d[~np.isnan(d)] for d in drawn] or [np.ones(1)])
    starts = [d[0] for d in drawn if not np.isnan(d[0])]
    top = min(values.max(initial=-np.inf), 10.0 * max(starts, default=np.inf))
    if not values.size:
        return 0.1, 1.0, True
    if values.min() < 0 or top <= 0:
        room = 0.05 * max(values.max() - values.min(), 1e-12)
        return float(values.min() - room), float(values.max() + room), False
    lowest = max(values[values > 0].min(), 1e-12 * top)
    return float(0.6 * lowest), float(1.5 * top), True


def curves_figure(
    panels: Sequence[Panel],
    looks: Mapping[str, tuple[str, str]],
    out: Path,
    *,
    xlabel: str = "optimizer steps",
    ylabel: str = "test loss",
) -> list[Path]:
    """One panel per task, one line per optimizer, log y; dotted line: the panel's target."""
    names = [name for name in looks if any(name in panel.lines for panel in panels)]
    shared = len(names) <= SHARED_LEGEND or len(panels) == 1
    columns = len(panels) if len(panels) <= 3 else 3 if shared and len(panels) > 4 else 2
    rows, width = -(-len(panels) // columns), 4.4 if shared else 6.6
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            *(rows, columns), figsize=(width * columns, 3.3 * rows),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _curves(axis, panel, looks)
            title = textwrap.fill(panel.title, 44, break_long_words=False)
            axis.set(title=_plain(title), xlabel=xlabel, ylabel=ylabel)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            if not shared:
                handles = _handles([name for name in names if name in panel.lines], looks)
                axis.legend(
                    handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7.5
                )
        if shared:
            handles = _handles(names, looks)
            figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)))
        return save(figure, out)


def _handles(names: Sequence[str], looks: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    """For a legend. The grid that a fallback was tuned on is left out where nothing is mistaken."""
    brief = [re.sub(r" \([^()]*\)\)$", ")", name) for name in names]
    labels = [
        short if brief.count(short) == 1 else name for name, short in zip(names, brief, strict=True)
    ]
    return [
        Line2D([], [], color=looks[name][0], ls=looks[name][1], lw=1.8, label=_plain(label))
        for name, label in zip(names, labels, strict=True)
    ]


def _curves(axis: Any, panel: Panel, looks: Mapping[str, tuple[str, str]]) -> None:
    low, high, logarithmic = loss_bounds(line.y.mean for line in panel.lines.values())
    axis.set(ylim=(low, high), yscale="log" if logarithmic else "linear")
    for name, line in panel.lines.items():
        colour, dash = looks[name]
        drawn, left = on_chart(line.y.mean)
        axis.plot(line.x, drawn, color=colour, ls=dash, lw=1.6)
        band = [np.clip(end, low / 10, high * 10) for end in (line.y.low, line.y.high)]
        axis.fill_between(line.x, *band, where=~np.isnan(drawn), color=colour, alpha=0.15, lw=0)
        if left is not None:
            axis.plot(line.x[left], drawn[left], "x", color=colour, ms=8, mew=2.5, clip_on=False)
    if np.isfinite(panel.target):
        axis.axhline(panel.target, color="grey", lw=0.9, ls=":")
        axis.annotate(
            panel.label, (0.01, panel.target), xycoords=("axes fraction", "data"),
            ha="left", va="top", fontsize=7, color="grey",
        )  # fmt: skip


def standings_figure(
    columns: Mapping[str, Mapping[str, Interval]], looks: Mapping[str, tuple[str, str]], out: Path
) -> list[Path]:
    """Aggregates with their intervals: title -> optimizer -> interval, one panel per title."""
    names = list(next(iter(columns.values())))
    size = (3.6 * len(columns) + 1.2, 0.32 * len(names) + 1.0)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, len(columns), figsize=size, squeeze=False, sharey=True, layout="constrained"
        )
        for axis, (title, intervals) in zip(axes.flat, columns.items(), strict=True):
            means = [float(i.mean) for i in intervals.values() if 0 < i.mean < np.inf]
            low, high = 0.5 * min([*means, 1.0]), 2.0 * max([*means, 1.0])
            axis.set(title=title, xscale="log", xlim=(low, high))
            # So that labels do not overlap, also where an optimizer that diverged widens the axis.
            few = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
            axis.xaxis.set_major_locator(LogLocator(subs=few, numticks=4))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.axvline(1.0, color="grey", lw=0.9, ls=":")
            for name, interval in intervals.items():
                if np.isnan(interval.mean):
                    continue
                y, (mean, *ends) = names.index(name), np.clip(interval, low, high)
                axis.plot(ends, [y, y], color=looks[name][0], lw=4, alpha=0.35)
                axis.plot(mean, y, "o", color=looks[name][0], ms=5)
        axes[0, 0].set_yticks(range(len(names)), [_plain(name) for name in names])
        axes[0, 0].invert_yaxis()
        return save(figure, out)


def meta_training_figure(runs: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> list[Path]:
    """Meta-loss per meta-update, one panel per run; dots: the loss on held-out runs."""
    columns = min(len(runs), 2 if len(runs) == 4 else 3)
    rows = -(-len(runs) // columns)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(runs) :]:
            axis.set_visible(False)
        for axis, (name, metrics) in zip(axes.flat, runs.items(), strict=False):
            step, loss = metrics["step"], metrics["meta_loss"]
            axis.plot(step, loss, color=COLOURS[2], lw=1.0, alpha=0.7, label="meta-loss")
            if "validation_loss" in metrics:
                axis.plot(
                    step, metrics["validation_loss"], "o", ms=3, color=COLOURS[4], label="held out"
                )
            low, high, logarithmic = meta_bounds(metrics)
            axis.set(title=_plain(name), xlabel="meta-updates", ylabel="loss of the inner run")
            axis.set(yscale="log" if logarithmic else "linear", ylim=(low, high))
            axis.legend()
        return save(figure, out)


def meta_bounds(metrics: Mapping[str, np.ndarray]) -> tuple[float, float, bool]:
    """`loss_bounds` of a meta-training, where single updates may explode and come back.

    The held-out losses are all shown, and the meta-loss up to three times its first value, if that
    is no explosion itself, or thirty times its median.
    """
    finite, held_out = (
        values[np.isfinite(values)]
        for values in (metrics["meta_loss"], metrics.get("validation_loss", np.ones(0)))
    )
    if not finite.size:
        return 0.1, 1.0, True
    middle = np.median(np.abs(finite))
    top = max(30.0 * middle, min(3.0 * np.abs(finite[0]), 1000.0 * middle))
    shown = np.minimum(finite, max(top, held_out.max(initial=0.0)))
    return loss_bounds([shown, held_out] if held_out.size else [shown])


def mixture_figure(
    x: np.ndarray,
    norms: np.ndarray,
    weights: np.ndarray,
    layers: Sequence[str],
    bases: Sequence[str],
    out: Path,
) -> list[Path]:
    """What L3RS does in a run: step norm lambda ``[W, L]`` and weights alpha ``[W, L, P]``."""
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, 1 + len(bases), figsize=(3.6 * (1 + len(bases)), 3.0), layout="constrained"
        )
        for index, (layer, colour) in enumerate(
            zip(layers, layer_colours(len(layers)), strict=True)
        ):
            axes[0].plot(x, norms[:, index], color=colour, label=_plain(layer))
            for p in range(len(bases)):
                axes[1 + p].plot(x, weights[:, index, p], color=colour)
        low, high, logarithmic = loss_bounds(norms.T)  # may explode with the run
        axes[0].set(title="step norm λ", xlabel="optimizer steps", ylim=(low, high))
        axes[0].set(yscale="log" if logarithmic else "linear")
        if len(layers) <= MANY_LAYERS:
            axes[0].legend(fontsize=7)
        for axis, base in zip(axes[1:], bases, strict=True):
            axis.set(
                title=f"weight α of {_plain(base)}", xlabel="optimizer steps", ylim=(-0.03, 1.03)
            )
        return save(figure, out)


def _plain(text: str) -> str:
    """A dollar sign in a user's name starts no formula."""
    return text.replace("$", r"\$")


def save(figure: Any, out: Path) -> list[Path]:
    """Writes ``out`` as PNG and PDF, and closes the figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path)
    plt.close(figure)
    return paths
