"""L3RS against tuned Adam on few-class fine-tuning, from the records of `experiments.l3rs`.

python -m experiments.l3rs --only A,A-500,B && python -m experiments.l3rs_figure
"""

from pathlib import Path

import matplotlib.pyplot as plt

from experiments.l3rs import OWN, PAPER, VELO
from experiments.panels import Panel
from metaopt.plots import COLOURS, loss_bounds, save, style
from metaopt.statistics import mean_interval

IMAGE = Path("docs/images/l3rs-finetuning")
PANELS = {"A": "new classes", "A-500": "beyond its horizon", "B": "other data"}
COLOUR = {"SGD": COLOURS[0], "Adam": COLOURS[1], VELO: COLOURS[2], OWN: COLOURS[4]}
GUARDED = {f"RACE({name}, Adam)": COLOUR[name] for name in (VELO, OWN)}


def main() -> None:
    """Draws the panels, as PNG and PDF."""
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4))
        for place, (name, title) in zip(axes, PANELS.items(), strict=True):
            curves = Panel(PAPER.out / name).curves
            for label, colour in (COLOUR | GUARDED).items():
                steps, loss = curves[label].steps[1:], curves[label].loss[:, 1:]
                mean, low, high = mean_interval(loss)
                form = "--" if label in GUARDED else "-"
                place.plot(steps, mean, form, color=colour, label=label)
                place.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            bounds = loss_bounds([curves[label].loss[:, 1:].mean(axis=0) for label in COLOUR])[:2]
            place.set(xlabel="step", ylabel="test loss", yscale="log", ylim=bounds, title=title)
        axes[1].legend(fontsize=7, loc="upper left")
        figure.tight_layout()
        save(figure, IMAGE)


if __name__ == "__main__":
    main()
