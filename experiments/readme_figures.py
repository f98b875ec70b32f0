"""The README's pictures of the papers' claims, from committed records.

    python -m experiments.readme_figures

What they show is run by `experiments.l3rs` (A, A-500, B) and `experiments.lgl2o` (fig03-start and
fig03).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from experiments import l3rs, lgl2o
from experiments.panels import Panel
from experiments.pictures import save
from metaopt.evaluation.statistics import mean_interval
from metaopt.report.plots import COLOURS, loss_bounds, style

IMAGES = Path("docs/images")


class Line(NamedTuple):
    """How an optimizer is drawn: its colour and dash, and what the legend calls it."""

    colour: str
    dash: str
    label: str


class Place(NamedTuple):
    """An axis: the folder of its records and its title.

    With losses to mark, these bound it, and steps are drawn by their logarithm as losses are.
    """

    folder: Path
    title: str
    marks: tuple[float, ...] = ()


_UNGUARDED = {
    "SGD": COLOURS[0], "Adam": COLOURS[1], l3rs.VELO: COLOURS[2], l3rs.OWN: COLOURS[4]
}  # fmt: skip
FINE_TUNING = {name: Line(colour, "-", name) for name, colour in _UNGUARDED.items()} | {
    (guarded := f"RACE({name}, Adam)"): Line(_UNGUARDED[name], "--", guarded)
    for name in (l3rs.VELO, l3rs.OWN)
}
FROM_SCRATCH = {
    lgl2o.SGD: Line(COLOURS[0], "-", "SGD, tuned"),
    "Adam": Line(COLOURS[1], "-", "Adam, tuned"),
    "L2O-300": Line(COLOURS[2], "-", "LSTM"),
    lgl2o.LGL2O_300: Line(COLOURS[3], "-", "LGL2O(LSTM, SGD)"),
    lgl2o.RACE_300: Line(COLOURS[4], "--", "RACE(LSTM, SGD)"),
}


def draw(
    lines: Mapping[str, Line], places: tuple[Place, ...], legend: tuple[int, str], name: str
) -> None:
    """Means and 95% bootstrap intervals over seeds.

    Args: lines: what is drawn, by name in the records; places: its axes; legend: in which of them
    and where; name: of the file.
    """
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, len(places), figsize=(12, 3.4))
        for axis, place in zip(axes, places, strict=True):
            curves = Panel(place.folder).curves
            for key, line in lines.items():
                steps, loss = curves[key].steps[1:], curves[key].loss[:, 1:]
                mean, low, high = mean_interval(loss)
                axis.plot(steps, mean, line.dash, color=line.colour, label=line.label)
                axis.fill_between(steps, low, high, color=line.colour, alpha=0.12, linewidth=0)
            axis.set(xlabel="step", ylabel="test loss", yscale="log", title=place.title)
            if place.marks:
                axis.set(xscale="log", ylim=(0.9 * place.marks[0], 1.1 * place.marks[-1]))
                axis.set_yticks(place.marks, map(str, place.marks))
                axis.minorticks_off()
            else:
                solid = [key for key, line in lines.items() if line.dash == "-"]
                means = [curves[key].loss[:, 1:].mean(axis=0) for key in solid]
                axis.set(ylim=loss_bounds(means)[:2])
        axes[legend[0]].legend(fontsize=7, loc=legend[1])
        figure.tight_layout()
        save(figure, IMAGES / f"{name}.png")


def main() -> None:
    """Draws both pictures."""
    of_l3rs, of_lgl2o = l3rs.PAPER.out, lgl2o.PAPER.out
    fine_tuning = (
        Place(of_l3rs / "A", "new classes"),
        Place(of_l3rs / "A-500", "beyond its horizon"),
        Place(of_l3rs / "B", "other data"),
    )
    draw(FINE_TUNING, fine_tuning, (1, "upper left"), "l3rs-finetuning")
    from_scratch = (
        Place(of_lgl2o / "fig03-start", "The first 1000 steps", (0.2, 0.3, 0.4, 0.6, 1.0)),
        Place(of_lgl2o / "fig03", "To 20 000 steps", (0.15, 0.2, 0.25, 0.3, 0.35)),
    )
    draw(FROM_SCRATCH, from_scratch, (0, "upper right"), "lgl2o-start")


if __name__ == "__main__":
    main()
