"""Records -> figures. Imports numpy and matplotlib only, so that it draws without JAX."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

# Okabe-Ito: told apart by colour-blind readers and in grey print.
COLOURS = ("#8C8C8C", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")


class Line(NamedTuple):
    """A curve with its band. Attributes: x, mean, low, high: ``[W]``."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


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


def looks_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, dash) per name, the same in every panel.

    A guarded optimizer, ``GUARD(learned, fallback)``, has the colour of its learned one and a dash
    of its guard.
    """
    guarded = {name: m.groups() for name in names if (m := re.match(r"(.+?)\((.+?), ", name))}
    plain = [name for name in names if name not in guarded]
    guards = list(dict.fromkeys(guard for guard, _ in guarded.values()))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(plain)}
    looks = {name: (colour, "-") for name, colour in colours.items()}
    for name, (guard, learned) in guarded.items():
        dash = DASHES[1 + guards.index(guard) % (len(DASHES) - 1)]
        looks[name] = (colours.get(learned, COLOURS[-1]), dash)
    return looks


def curves_figure(
    panels: Mapping[str, Mapping[str, Line]],
    out: Path,
    *,
    ylabel: str = "test loss",
    targets: Mapping[str, tuple[str, float]] | None = None,
) -> list[Path]:
    """One panel per task, one line per optimizer, log y; dotted line: a target and its name."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    looks = looks_of(names)
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4.4 * columns, 3.3 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            for name, line in lines.items():
                colour, dash = looks[name]
                finite = np.where(np.isfinite(line.mean), line.mean, np.nan)
                axis.plot(line.x, finite, color=colour, ls=dash, lw=1.6, label=name)
                axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, lw=0)
                if not np.isfinite(line.mean).all():  # a cross where it diverged
                    last = max(int(np.argmin(np.isfinite(line.mean))) - 1, 0)
                    axis.plot(line.x[last], line.mean[last], "x", color=colour, ms=8, mew=2.5)
            axis.set(title=title, xlabel="optimizer steps", ylabel=ylabel, yscale="log")
            _bound_log_axis(axis, lines)
            if targets and title in targets:
                label, value = targets[title]
                axis.axhline(value, color="grey", lw=0.9, ls=":")
                axis.annotate(
                    label,
                    (0.01, value),
                    xycoords=("axes fraction", "data"),
                    ha="left",
                    va="top",
                    fontsize=7,
                    color="grey",
                )
        handles = [
            Line2D([], [], color=looks[n][0], ls=looks[n][1], lw=1.8, label=n) for n in names
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)))
        return _save(figure, out)


def meta_training_figure(runs: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> list[Path]:
    """Meta-loss per meta-update, one panel per run; dots: the loss on held-out runs."""
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, len(runs), figsize=(4.2 * len(runs), 3.0), squeeze=False, layout="constrained"
        )
        for axis, (name, metrics) in zip(axes.flat, runs.items(), strict=True):
            step, loss = metrics["step"], metrics["meta_loss"]
            axis.plot(step, loss, color=COLOURS[2], lw=1.0, alpha=0.7, label="meta-loss")
            if "validation_loss" in metrics:
                axis.plot(
                    step, metrics["validation_loss"], "o", ms=3, color=COLOURS[4], label="held out"
                )
            axis.set(title=name, xlabel="meta-updates", ylabel="loss of the inner run")
            axis.set_yscale("log")
            top = min(1.5 * np.nanmax(loss), 3.0 * loss[0])  # single candidates may explode
            axis.set_ylim(0.6 * np.nanmin(loss), top)
            axis.legend()
        return _save(figure, out)


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
        for index, layer in enumerate(layers):
            axes[0].plot(x, norms[:, index], color=COLOURS[index % len(COLOURS)], label=layer)
            for p in range(len(bases)):
                axes[1 + p].plot(x, weights[:, index, p], color=COLOURS[index % len(COLOURS)])
        axes[0].set(title="step norm λ", xlabel="optimizer steps", yscale="log")
        axes[0].legend(fontsize=7)
        for axis, base in zip(axes[1:], bases, strict=True):
            axis.set(title=f"weight α of {base}", xlabel="optimizer steps", ylim=(-0.03, 1.03))
        return _save(figure, out)


def _bound_log_axis(axis: Any, lines: Mapping[str, Line]) -> None:
    """Limits by the means: neither a diverged run nor a wide band squeezes the others."""
    means = [line.mean[np.isfinite(line.mean) & (line.mean > 0)] for line in lines.values()]
    start = max(mean[0] for mean in means)
    lowest, high = min(mean.min() for mean in means), max(mean.max() for mean in means)
    axis.set_ylim(0.6 * lowest, min(1.5 * high, 10.0 * start))


def _save(figure: Any, out: Path) -> list[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    paths = [out.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path)
    plt.close(figure)
    return paths
