"""Draws why LGL2O can fall behind its own fallback, from the records of `experiments.lgl2o`.

    python -m experiments.lgl2o --only behind     # the records, about an hour
    python -m experiments.lgl2o_mechanism         # the figure, some seconds

Writes docs/images/lgl2o-mechanism.png; docs/guards/race.md shows it.

Left: test losses. Middle: the share of windows that L2O wins. In the first hundreds of steps SGD's
rate is high: ten of its noisy steps from the kept point do not lower the loss at once, and the
learned proposal wins. Right: the losses that the guards compare. What SGD would have gained in the
long run is lost meanwhile: from the kept point it does not catch up with its own run, which race
continues, because the rate has decayed.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.figure_records import FigureRecords
from experiments.lgl2o import LGL2O, PAPER, RACE, SGD
from experiments.pictures import save
from metaopt.evaluation.records import Curves
from metaopt.report.figures import style
from metaopt.report.looks import COLOURS

IMAGE = Path("docs/images/lgl2o-mechanism.png")
SMOOTHING = 20  # windows that a point of the middle and right axes averages

OPTIMIZERS = {  # name in the records -> (colour, label)
    SGD: (COLOURS[0], "SGD"),
    "L2O": (COLOURS[2], "L2O"),
    LGL2O: (COLOURS[3], "LGL2O(L2O, SGD)"),
    RACE: (COLOURS[4], "race(L2O, SGD)"),
}
CANDIDATES = (  # (guard, index of the candidate, colour, dash, label)
    (LGL2O, 0, COLOURS[3], "-", "LGL2O: 10 L2O steps from the kept point"),
    (LGL2O, 1, COLOURS[0], "--", "LGL2O: 10 SGD steps from the kept point"),
    (RACE, 1, COLOURS[0], "-", "race: SGD's own run"),
)


def main() -> None:
    """Draws the figure."""
    curves = FigureRecords(PAPER.out / "behind").curves
    with plt.rc_context(style()):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
        draw_losses(left, curves)
        draw_wins(middle, curves)
        draw_candidates(right, curves)
        for axis in (left, middle, right):
            axis.set_xlabel("step")
            axis.legend(fontsize=7)
        figure.tight_layout()
        save(figure, IMAGE)


def draw_losses(axis: Any, curves: dict[str, Curves]) -> None:
    """Mean test loss over seeds, and the range of the seeds."""
    for name, (colour, label) in OPTIMIZERS.items():
        steps, loss = curves[name].steps[1:], curves[name].loss[:, 1:]
        low, high = loss.min(axis=0), loss.max(axis=0)
        axis.plot(steps, loss.mean(axis=0), color=colour, label=label)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    start = float(np.mean(curves[SGD].loss[:, 0]))
    axis.set(ylabel="test loss", ylim=(None, start), yscale="log", title="The runs")


def draw_wins(axis: Any, curves: dict[str, Curves]) -> None:
    """The share of windows that L2O wins."""
    for name in (LGL2O, RACE):
        colour, label = OPTIMIZERS[name]
        steps, accepted = smoothed(curves[name], "accepted")
        axis.plot(steps, accepted, color=colour, label=label)
    axis.set(ylim=(0, 1), title="Windows that L2O wins")


def draw_candidates(axis: Any, curves: dict[str, Curves]) -> None:
    """The validation losses of the candidates that the guards compare."""
    for guard, index, colour, dash, label in CANDIDATES:
        steps, losses = smoothed(curves[guard], "losses")
        axis.plot(steps, losses[:, index], dash, color=colour, label=label)
    axis.set(ylabel="validation loss", yscale="log", title="What the guards compare")


def smoothed(curves: Curves, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Averages a field of the guard's state over seeds and blocks of `SMOOTHING` windows.

    Returns:
      Steps ``[n]`` and values ``[n, ...]``; windows that do not fill a block are left out.
    """

    def block_means(x):
        count = len(x) // SMOOTHING
        blocks = x[: count * SMOOTHING].reshape(count, SMOOTHING, *x.shape[1:])
        return blocks.mean(axis=1)

    return block_means(curves.windows), block_means(curves.state[field].mean(axis=0))


if __name__ == "__main__":
    main()
