"""Why LGL2O can fall behind its own fallback: a figure from the records of `experiments.lgl2o`.

    python -m experiments.lgl2o --only behind && python -m experiments.lgl2o_mechanism

Left: test losses. Middle: whom the guards believe. In the first hundreds of steps SGD's rate is
high, ten of its noisy steps from the kept point do not pay at once, and the learned proposal wins.
Right: what SGD would have gained in the long run meanwhile is lost. From the kept point it does not
catch up with its own run, which race carries along, since the rate has decayed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.lgl2o import LGL2O, PAPER, RACE, SGD
from experiments.panels import Panel
from experiments.pictures import save
from metaopt.evaluation.records import Curves
from metaopt.report.plots import COLOURS, style

IMAGE = Path("docs/images/lgl2o-mechanism.png")
SMOOTH = 20  # windows that a point of the middle and right panels is the mean of


def averaged(curves: Curves, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps ``[n]``, and a field's mean over seeds and `SMOOTH` windows, ``[n, ...]``."""
    values = curves.state[field].mean(axis=0)
    count = len(values) // SMOOTH
    parts = lambda x: x[: count * SMOOTH].reshape(count, SMOOTH, *x.shape[1:]).mean(axis=1)
    return parts(curves.windows), parts(values)


def main() -> None:
    """Draws the figure."""
    curves = Panel(PAPER.out / "behind").curves
    colours = {SGD: COLOURS[0], "L2O": COLOURS[2], LGL2O: COLOURS[3], RACE: COLOURS[4]}
    names = {SGD: "SGD", "L2O": "L2O", LGL2O: "LGL2O(L2O, SGD)", RACE: "race(L2O, SGD)"}
    with plt.rc_context(style()):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4))
        for name, colour in colours.items():
            steps, loss = curves[name].steps[1:], curves[name].loss[:, 1:]
            left.plot(steps, loss.mean(axis=0), color=colour, label=names[name])
            left.fill_between(
                steps, loss.min(axis=0), loss.max(axis=0), color=colour, alpha=0.15, linewidth=0
            )
        for name in (LGL2O, RACE):
            middle.plot(*averaged(curves[name], "accepted"), color=colours[name], label=names[name])
        seen = (
            (LGL2O, 0, COLOURS[3], "-", "LGL2O: 10 L2O steps from the kept point"),
            (LGL2O, 1, COLOURS[0], "--", "LGL2O: 10 SGD steps from the kept point"),
            (RACE, 1, COLOURS[0], "-", "race: SGD's own run"),
        )
        for name, candidate, colour, dash, label in seen:
            steps, losses = averaged(curves[name], "losses")
            right.plot(steps, losses[:, candidate], dash, color=colour, label=label)
        start = float(np.mean(curves[SGD].loss[:, 0]))
        left.set(ylabel="test loss", ylim=(None, start), yscale="log", title="The runs")
        middle.set(ylim=(0, 1), title="Windows that L2O wins")
        right.set(ylabel="validation loss", yscale="log", title="What the guards compare")
        for axes in (left, middle, right):
            axes.set_xlabel("step")
            axes.legend(fontsize=7)
        figure.tight_layout()
        save(figure, IMAGE)


if __name__ == "__main__":
    main()
