"""L3RS against tuned Adam on few-class fine-tuning, from the records of `experiments.l3rs`.

python -m experiments.l3rs --only A,A-500,B && python -m experiments.l3rs_figure
"""

from pathlib import Path

import matplotlib.pyplot as plt

from experiments.l3rs import OWN, PAPER, VELO
from experiments.panels import Panel
from metaopt.plots import COLOURS, save, style
from metaopt.statistics import mean_interval

IMAGE = Path("docs/images/l3rs-finetuning")
PANELS = {"A": "new classes", "A-500": "beyond its horizon", "B": "other data"}
COLOUR = {"SGD": COLOURS[0], "Adam": COLOURS[1], VELO: COLOURS[2], OWN: COLOURS[4]}
RACE = f"RACE({OWN}, Adam)"


def main() -> None:
    """Draws the panels that have records, as PNG and PDF."""
    there = {name: title for name, title in PANELS.items() if (PAPER.out / name).exists()}
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, len(there), figsize=(4 * len(there), 3.2), squeeze=False)
        for place, (name, title) in zip(axes[0], there.items(), strict=True):
            curves = Panel(PAPER.out / name).curves
            for label, colour in (COLOUR | {RACE: COLOURS[4]}).items():
                if label not in curves:
                    continue
                steps, loss = curves[label].steps[1:], curves[label].loss[:, 1:]
                mean, low, high = mean_interval(loss)
                place.plot(steps, mean, "--" if label == RACE else "-", color=colour, label=label)
                place.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            place.set(xlabel="step", ylabel="test loss", yscale="log", title=title)
        axes[0, 0].legend(fontsize=7)
        figure.tight_layout()
        save(figure, IMAGE)


if __name__ == "__main__":
    main()
