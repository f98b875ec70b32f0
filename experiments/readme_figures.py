"""Draws the pictures of the README and of docs/results/README.md from committed records.

    python -m experiments.readme_figures

Takes some seconds. Reads docs/results/digits (of `experiments.digits`), docs/results/specialised
(of `metaopt specialise digits` and `experiments.finetuning`), docs/results/l3rs (A, A-500, B) and
docs/results/lgl2o (fig03-start, fig03), which `experiments.l3rs` and `experiments.lgl2o` write,
and docs/results/general (of `experiments.general`). Writes digits-comparison, specialised,
l3rs-finetuning, lgl2o-start and general to docs/images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from experiments import l3rs, lgl2o
from experiments.figure_records import FigureRecords
from experiments.pictures import save
from metaopt.evaluation.records import Curves
from metaopt.evaluation.statistics import mean_interval
from metaopt.report import figures, summary
from metaopt.report.looks import COLOURS, loss_bounds

IMAGES = Path("docs/images")


class LineStyle(NamedTuple):
    """How an optimizer is drawn, and what the legend calls it."""

    colour: str
    dash: str
    label: str


class Subplot(NamedTuple):
    """One axis of a picture.

    Attributes:
      folder: records of the figure that is drawn.
      title: title of the axis.
      loss_ticks: losses to label, which also bound the axis; steps are then logarithmic too.
        Empty: chosen from the losses.
    """

    folder: Path
    title: str
    loss_ticks: tuple[float, ...] = ()


class Picture(NamedTuple):
    """A row of axes with the same optimizers.

    Attributes:
      name: file name, without suffix.
      styles: name of each optimizer in the records -> how it is drawn.
      subplots: the axes.
      legend_axis: index of the axis with the legend.
      legend_location: matplotlib's name of a corner.
    """

    name: str
    styles: Mapping[str, LineStyle]
    subplots: tuple[Subplot, ...]
    legend_axis: int
    legend_location: str


L3RS_RECORDS, LGL2O_RECORDS = l3rs.PAPER.out, lgl2o.PAPER.out
RACE_VELO, RACE_L3RS = f"RACE({l3rs.VELO}, Adam)", f"RACE({l3rs.L3RS}, Adam)"
GENERAL = Path("docs/results/general")
DIGITS_RECORDS, SPECIALISED = Path("docs/results/digits"), Path("docs/results/specialised")


def four_lines(best: str, fallback: str) -> dict[str, LineStyle]:
    """Tuned Adam and the best tuned baseline, L3RS, and race with `fallback`."""
    return {
        "Adam": LineStyle(COLOURS[1], "-", "Adam, tuned"),
        best: LineStyle(COLOURS[0], "-", f"{best}, tuned"),
        "L3RS": LineStyle(COLOURS[2], "-", "L3RS, specialised"),
        f"RACE(L3RS, {fallback})": LineStyle(COLOURS[3], "--", f"race(L3RS, {fallback})"),
    }


PICTURES = (
    Picture(
        name="digits-comparison",
        styles=four_lines(best="Muon", fallback="Muon"),
        subplots=(
            Subplot(DIGITS_RECORDS / "00-digits-100", "digits, 100 steps"),
            Subplot(DIGITS_RECORDS / "01-digits-1000", "digits, 1000 steps"),
            Subplot(DIGITS_RECORDS / "02-spirals-1000", "spirals, not seen: L3RS fails"),
            Subplot(DIGITS_RECORDS / "03-digits-deep-1000", "deeper network, not seen"),
        ),
        legend_axis=0,
        legend_location="upper right",
    ),
    Picture(
        name="specialised",
        styles=four_lines(best="Schedule-free AdamW", fallback="Adam"),
        subplots=(
            Subplot(SPECIALISED / "digits-100" / "00-digits-100", "MLP on digits"),
            *(
                Subplot(
                    SPECIALISED
                    / "finetuning-100"
                    / f"{number}-experiments.finetuning-{name}_100-50",
                    f"new head, {title}",
                )
                for number, name, title in (
                    ("00", "unseen", "unseen classes"),
                    ("01", "fashion", "clothes"),
                    ("02", "digits", "digits"),
                )
            ),
        ),
        legend_axis=0,
        legend_location="upper right",
    ),
    Picture(
        name="l3rs-finetuning",
        styles={
            "SGD": LineStyle(COLOURS[0], "-", "SGD"),
            "Adam": LineStyle(COLOURS[1], "-", "Adam"),
            l3rs.VELO: LineStyle(COLOURS[2], "-", l3rs.VELO),
            l3rs.L3RS: LineStyle(COLOURS[4], "-", l3rs.L3RS),
            RACE_VELO: LineStyle(COLOURS[2], "--", RACE_VELO),
            RACE_L3RS: LineStyle(COLOURS[4], "--", RACE_L3RS),
        },
        subplots=(
            Subplot(L3RS_RECORDS / "A", "new classes"),
            Subplot(L3RS_RECORDS / "A-500", "beyond its horizon"),
            Subplot(L3RS_RECORDS / "B", "other data"),
        ),
        legend_axis=1,
        legend_location="upper left",
    ),
    Picture(
        name="lgl2o-start",
        styles={
            lgl2o.SGD: LineStyle(COLOURS[0], "-", "SGD, tuned"),
            "Adam": LineStyle(COLOURS[1], "-", "Adam, tuned"),
            "L2O-300": LineStyle(COLOURS[2], "-", "LSTM"),
            lgl2o.LGL2O_300: LineStyle(COLOURS[3], "-", "LGL2O(LSTM, SGD)"),
            lgl2o.RACE_300: LineStyle(COLOURS[4], "--", "RACE(LSTM, SGD)"),
        },
        subplots=(
            Subplot(
                LGL2O_RECORDS / "fig03-start",
                "The first 1000 steps",
                loss_ticks=(0.2, 0.3, 0.4, 0.6, 1.0),
            ),
            Subplot(
                LGL2O_RECORDS / "fig03",
                "To 20 000 steps",
                loss_ticks=(0.15, 0.2, 0.25, 0.3, 0.35),
            ),
        ),
        legend_axis=0,
        legend_location="upper right",
    ),
)


def draw(picture: Picture) -> None:
    """Draws means and 95% bootstrap intervals over seeds."""
    with plt.rc_context(figures.style()):
        figure, axes = plt.subplots(1, len(picture.subplots), figsize=(12, 3.4))
        for axis, subplot in zip(axes, picture.subplots, strict=True):
            _draw_subplot(axis, subplot, picture.styles)
        axes[picture.legend_axis].legend(fontsize=7, loc=picture.legend_location)
        figure.tight_layout()
        save(figure, IMAGES / f"{picture.name}.png")


def _draw_subplot(axis: Any, subplot: Subplot, styles: Mapping[str, LineStyle]) -> None:
    curves: dict[str, Curves] = FigureRecords(subplot.folder).curves
    for name, line in styles.items():
        steps, loss = curves[name].steps[1:], curves[name].loss[:, 1:]
        mean, low, high = mean_interval(loss)
        axis.plot(steps, mean, line.dash, color=line.colour, label=line.label)
        axis.fill_between(steps, low, high, color=line.colour, alpha=0.12, linewidth=0)
    axis.set(xlabel="step", ylabel="test loss", yscale="log", title=subplot.title)
    ticks = subplot.loss_ticks
    if ticks:
        axis.set(xscale="log", ylim=(0.9 * ticks[0], 1.1 * ticks[-1]))
        axis.set_yticks(ticks, map(str, ticks))
        axis.minorticks_off()
    else:
        # The unguarded optimizers, which are drawn solid, bound the axis.
        unguarded = [name for name, line in styles.items() if line.dash == "-"]
        low, high, _ = loss_bounds(curves[name].loss[:, 1:].mean(axis=0) for name in unguarded)
        axis.set(ylim=(low, high))


def main() -> None:
    """Draws all pictures."""
    for picture in PICTURES:
        draw(picture)
    save(figures.drawings(summary.load(GENERAL))["aggregate"](), IMAGES / "general.png")


if __name__ == "__main__":
    main()
