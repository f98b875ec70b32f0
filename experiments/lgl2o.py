"""LGL2O (Premont-Schwarz et al. 2022): figures 3 to 6, 9, 12 to 17 on MNIST and FashionMNIST.

Claims: a learned optimizer is fast at first, on its own task and on some others, and diverges
later or elsewhere; under LGL2O it keeps the start and loses the divergence; GL2O is slower.
Beside them runs `race`, our own guard.

    make reproduce-lgl2o      # or: python -m experiments.lgl2o [--only fig03] [--full]

Against the paper: the first optimizer is meta-trained on MLP-20/MNIST as there; the second on
CNN-3/FashionMNIST instead of CIFAR-10 (whose files are not at hand); runs have 20 000 to 50 000
steps where the paper has up to 120 000, those of CNNs 2 000; tests on CIFAR-10 and TinyImageNet
(figures 7, 8) need their files. ``--full`` has the paper's lengths.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.checks import (
    below,
    best_of,
    diverges,
    every,
    level,
    negated,
    rises,
    stays_finite,
    switches,
)
from experiments.panels import Claim
from experiments.reproduction import Figure, Makes, Reproduction, main
from metaopt.baselines import BASELINES
from metaopt.contenders import Contender, Learned, guarded

MLP, CNN = ("lstm-mlp-mnist",), ("lstm-cnn-fmnist",)


def with_losses(learned: Sequence[Learned], makes: Makes) -> list[Contender]:
    """LGL2O and race, with the losses of both candidates at every decision."""
    label, make = BASELINES["sgd-lgl2o"].label, makes["sgd-lgl2o"]
    found = [guarded(learned[0], guard, label, make, 10) for guard in ("lgl2o", "race")]
    return [one._replace(fields=("accepted", "losses")) for one in found]


def figures(full: bool) -> list[Figure]:
    """The panels; `full` has the paper's lengths."""
    long, longer, convolutional = (100_000, 120_000, 100_000) if full else (20_000, 50_000, 2_000)
    return [
        Figure(
            name="fig03-start",
            title="Fig. 3, start: the MLP's optimizer at home, MLP-20 on MNIST",
            **{"task": "mnist-mlp20", "num_steps": 1_000, "measure_every": 2, "learned": MLP},
            baselines=("sgd-lgl2o", "sgd", "adam"),
        ),
        Figure(
            name="behind",
            title="Where LGL2O falls behind: the MLP's optimizer on MLP-20, FashionMNIST",
            **{"task": "fashion-mlp20", "num_steps": 6_000, "measure_every": 10, "learned": MLP},
            guards=(),
            more=with_losses,
        ),
        Figure(
            name="fig05",
            title="Figs. 5 and 9: the MLP's optimizer on spirals, four fallbacks",
            **{"task": "spirals-mlp20", "num_steps": longer, "measure_every": 50, "learned": MLP},
            baselines=("sgd-lgl2o", "sgd", "momentum", "adam"),
            fallbacks=("sgd-lgl2o", "momentum", "adam"),
        ),
        Figure(
            name="fig04",
            title="Fig. 4: the MLP's optimizer on circles",
            **{"task": "circles-mlp20", "num_steps": long, "measure_every": 20, "learned": MLP},
        ),
        Figure(
            name="fig17-50",
            title="Fig. 17: as fig. 4, windows of 50 steps",
            **{"task": "circles-mlp20", "num_steps": long, "measure_every": 4, "learned": MLP},
            guards=("lgl2o", "race"),
            window=50,
        ),
        Figure(
            name="fig17-100",
            title="Fig. 17: as fig. 4, windows of 100 steps",
            **{"task": "circles-mlp20", "num_steps": long, "measure_every": 2, "learned": MLP},
            guards=("lgl2o", "race"),
            window=100,
        ),
        Figure(
            name="fig06",
            title="Fig. 6: the MLP's optimizer on CNN-3, MNIST",
            **{"task": "mnist-cnn3", "num_steps": 1_000, "measure_every": 5, "learned": MLP},
        ),
        Figure(
            name="fig14",
            title="Fig. 14: the CNN's optimizer on spirals",
            **{"task": "spirals-mlp20", "num_steps": longer, "measure_every": 50, "learned": CNN},
        ),
        Figure(
            name="fig15",
            title="Fig. 15: the CNN's optimizer on circles",
            **{"task": "circles-mlp20", "num_steps": long, "measure_every": 20, "learned": CNN},
        ),
        Figure(
            name="fig16",
            title="Fig. 16: the CNN's optimizer at home, CNN-3 on FashionMNIST",
            task="fashion-cnn3",
            **{"num_steps": convolutional, "measure_every": 5, "learned": CNN},
        ),
        Figure(
            name="fig13",
            title="Fig. 13: the CNN's optimizer on CNN-3, MNIST",
            task="mnist-cnn3",
            **{"num_steps": convolutional, "measure_every": 5, "learned": CNN},
        ),
        Figure(
            name="fig03",
            title="Fig. 3: the MLP's optimizer at home, MLP-20 on MNIST",
            **{"task": "mnist-mlp20", "num_steps": long, "measure_every": 50, "learned": MLP},
        ),
        Figure(
            name="fig12",
            title="Fig. 12: the CNN's optimizer on MLP-20, MNIST",
            **{"task": "mnist-mlp20", "num_steps": long, "measure_every": 50, "learned": CNN},
        ),
    ]


SGD = "SGD (LGL2O's grid)"
LGL2O, GL2O, RACE = (f"{guard}(L2O, {SGD})" for guard in ("LGL2O", "GL2O", "RACE"))
CLAIMS = (
    Claim("3", "L2O is the fastest at first", "fig03-start",
          every(below("L2O", SGD, "Adam", step=50), below("L2O", SGD, "Adam", step=100))),
    Claim("3", "early on L2O < GL2O < SGD in loss", "fig03-start",
          every(below("L2O", GL2O, step=100), below(GL2O, SGD, step=100))),
    Claim("3", "L2O turns around at about step 1000", "fig03", rises("L2O")),
    Claim("3", "LGL2O is never above the better of L2O and SGD", "fig03",
          best_of(LGL2O, "L2O", SGD)),
    Claim("3", "LGL2O uses L2O first, later both", "fig03", switches(LGL2O)),
    Claim("3", "GL2O does not diverge", "fig03", stays_finite(GL2O)),
    Claim("ours", "race is never above the better of L2O and SGD", "fig03",
          best_of(RACE, "L2O", SGD)),
    Claim("ours", "on FashionMNIST LGL2O falls behind SGD's own run, race does not", "behind",
          every(below(SGD, LGL2O), best_of(RACE, "L2O", SGD))),
    Claim("4", "early on LGL2O is as fast as L2O, GL2O slower", "fig04",
          every(level(LGL2O, "L2O", step=500), below("L2O", GL2O, step=500))),
    Claim("4", "L2O turns around later; GL2O does not diverge", "fig04",
          every(rises("L2O"), stays_finite(GL2O))),
    Claim("4", "LGL2O starts to rise after some 20 000 steps", "fig04", rises(LGL2O)),
    Claim("5", "SGD stays at a local optimum, all variants of L2O pass it", "fig05",
          every(below("L2O", SGD), below(LGL2O, SGD), below(GL2O, SGD))),
    Claim("5", "LGL2O is as fast as L2O, GL2O slower", "fig05",
          every(level(LGL2O, "L2O", step=5_000), below("L2O", GL2O, step=5_000))),
    Claim("5", "in the end LGL2O is below both L2O and SGD", "fig05", below(LGL2O, "L2O", SGD)),
    Claim("9", "Adam is a better fallback than SGD", "fig05", below("LGL2O(L2O, Adam)", LGL2O)),
    Claim("9", "tuned Adam wins in the long run, LGL2O early", "fig05",
          every(below("Adam", LGL2O), below(LGL2O, "Adam", step=1_000))),
    Claim("6", "L2O and GL2O diverge quickly on a CNN", "fig06",
          every(diverges("L2O"), diverges(GL2O))),
    Claim("6", "there LGL2O is SGD", "fig06", level(LGL2O, SGD)),
    Claim("12", "L2O is stable for long, LGL2O reaches a better loss", "fig12",
          every(stays_finite("L2O"), below(LGL2O, "L2O"))),
    Claim("13", "L2O diverges on the other data, GL2O counters it", "fig13",
          every(diverges("L2O"), stays_finite(GL2O))),
    Claim("13", "LGL2O is far below both of its parts", "fig13", below(LGL2O, "L2O", SGD)),
    Claim("14", "SGD and GL2O are stuck, L2O and LGL2O pass", "fig14",
          every(below("L2O", SGD, GL2O), below(LGL2O, SGD, GL2O))),
    Claim("15", "all learned ones are faster than SGD, GL2O the slowest of them", "fig15",
          every(below(GL2O, SGD, step=1_000), below("L2O", GL2O, step=1_000))),
    Claim("16", "LGL2O is the best and does not become unstable", "fig16",
          every(below(LGL2O, "L2O", SGD), stays_finite(LGL2O))),
    Claim("17", "with windows of 100 steps LGL2O does not rise late", "fig17-100",
          negated(rises(LGL2O))),
)  # fmt: skip

PAPER = Reproduction(
    "LGL2O, figures 3 to 17", figures, seeds=(5, 5), out=Path("docs/results/lgl2o")
)

if __name__ == "__main__":
    main(PAPER, "experiments.lgl2o")
