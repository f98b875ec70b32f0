"""Why LGL2O can fall behind its own fallback: a figure from the records of `experiments.lgl2o`.

    python -m experiments.lgl2o --only behind && python -m experiments.lgl2o_mechanism

Left: test losses. Right: what the guard sees at its decisions. LGL2O's fallback restarts from the
kept point at every window, where ten noisy SGD steps do not pay at once, so the learned proposal
wins and wins, while SGD's own run, which race carries along, has long gone lower.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.lgl2o import LGL2O, PAPER, RACE, SGD
from experiments.panels import Panel
from metaopt.plots import COLOURS, style

IMAGE = Path("docs/images/lgl2o-mechanism")
SMOOTH = 20  # windows that a point of the right panel is the mean of


def main() -> None:
    """Draws the figure as PNG and PDF."""
    curves = Panel(PAPER.out / "behind").curves
    colours = {SGD: COLOURS[0], "L2O": COLOURS[2], LGL2O: COLOURS[3], RACE: COLOURS[4]}
    names = {SGD: "SGD", "L2O": "L2O", LGL2O: "LGL2O(L2O, SGD)", RACE: "race(L2O, SGD)"}
    with plt.rc_context(style()):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
        for name, colour in colours.items():
            steps, loss = curves[name].steps[1:], curves[name].loss[:, 1:]
            left.plot(steps, loss.mean(axis=0), color=colour, label=names[name])
            left.fill_between(
                steps, loss.min(axis=0), loss.max(axis=0), color=colour, alpha=0.15, linewidth=0
            )
        seen = (
            (LGL2O, 0, COLOURS[3], "-", "LGL2O: ten L2O steps from the kept point"),
            (LGL2O, 1, COLOURS[0], "--", "LGL2O: ten SGD steps from the kept point"),
            (RACE, 1, COLOURS[0], "-", "race: SGD's own run"),
        )
        for name, candidate, colour, dash, label in seen:
            losses = curves[name].state["losses"][..., candidate].mean(axis=0)
            count = len(losses) // SMOOTH * SMOOTH
            at = curves[name].windows[:count].reshape(-1, SMOOTH).mean(axis=1)
            mean = losses[:count].reshape(-1, SMOOTH).mean(axis=1)
            right.plot(at, mean, dash, color=colour, label=label)
        start = float(np.mean(curves[SGD].loss[:, 0]))
        left.set(xlabel="step", ylabel="test loss", ylim=(None, start), title="The runs")
        right.set(xlabel="step", title="What the guard compares (validation loss)")
        for axes in (left, right):
            axes.set_yscale("log")
            axes.legend(fontsize=7)
        figure.tight_layout()
        for suffix in (".png", ".pdf"):
            figure.savefig(IMAGE.with_suffix(suffix), dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    main()
