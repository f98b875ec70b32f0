"""LGL2O (Premont-Schwarz et al. 2022): figures 3 to 7, 9, 12 to 17 on MNIST and FashionMNIST.

Claims: a learned optimizer is fast at first, on its own task and on some others, and diverges
later or elsewhere; under LGL2O it keeps the start and loses the divergence; GL2O is slower.
Beside them runs `race`, our own guard.

    make reproduce-lgl2o      # or: python -m experiments.lgl2o [--only fig03] [--full]

Against the paper: the first optimizer is meta-trained on MLP-20/MNIST as there; the second on
CNN-3/FashionMNIST instead of CIFAR-10 (whose files are not at hand), on which figures 7 and 16
stand too; beside each stands an L2O-300, of runs of up to 300 or 400 steps by a recipe of ours
(docs/meta-training.md), on its home task and some others; runs have 20 000 to 50 000 steps where
the paper has up to 120 000, those of CNNs 1 000; figure 8 needs the files of TinyImageNet.
``--full`` has the paper's lengths.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import metaopt
from experiments.checks import (
    below,
    best_of,
    diverges,
    every,
    level,
    negated,
    never_diverges,
    rises,
    stuck,
    switches,
)
from experiments.panels import Claim
from experiments.reproduction import Figure, Makes, Reproduction, main
from metaopt import guards
from metaopt.core.rollouts import windowed
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.contenders import Contender, Learned, from_export, guarded, plain

GUARDS = ("gl2o", "lgl2o", "race")
MLP, CNN = {"L2O": "lstm-mlp-mnist"}, {"L2O": "lstm-cnn-fmnist"}
# The second ones: meta-trained on runs of up to 300 (CNN) or 400 steps.
BOTH, BOTH_CNN = ({"L2O": of["L2O"], "L2O-300": f"{of['L2O']}-300"} for of in (MLP, CNN))


def other(learned: Sequence[Learned], makes: Makes) -> list[Contender]:
    """L2O-300 beside L2O, without a guard."""
    return [plain(from_export("L2O-300", metaopt.load(BOTH["L2O-300"])))]


def with_losses(learned: Sequence[Learned], makes: Makes) -> list[Contender]:
    """LGL2O and race, with the losses of both candidates at every decision."""
    label, make = BASELINES["sgd-lgl2o"].label, makes["sgd-lgl2o"]
    return [
        guarded(one, guard, label, make, 10)._replace(fields=("accepted", "losses"))
        for one in learned
        for guard in ("lgl2o", "race")
    ]


def streams(learned: Sequence[Learned], makes: Makes) -> list[Contender]:
    """Windows of one size and of growing sizes on one stream, whose every other half validates.

    Only there can sizes differ from seed to seed. A step of the x-axis is a mini-batch: guards take
    half as many optimizer steps.
    """
    one, sgd = learned[0], makes["sgd-lgl2o"]

    def stream(name: str, build: Callable[[Any, Any], guards.Guard]) -> Contender:
        make = lambda n: windowed(guards.streaming(build(one.make(n // 2), sgd(n // 2))))
        fields = ("accepted", "n_t")
        guard = name.partition(",")[0].lower()
        return Contender(name, "guarded", make, True, fields, one, guard, SGD)

    sized = lambda n: lambda y, z: guards.lgl2o(y, z, n_t=n, n_c=n)
    grows = lambda rule: (
        lambda y, z: guards.lgl2o(y, z, adaptive=guards.Adaptive(rule=rule, cap=160))
    )
    return [
        stream("LGL2O, windows of 10", sized(10)),
        stream("LGL2O, windows of 100", sized(100)),
        stream("LGL2O, growing (std)", grows("std")),
        stream("LGL2O, growing (paired)", grows("paired")),
        stream("RACE, windows of 10", guards.race),
    ]


def figures(full: bool) -> list[Figure]:
    """The panels; `full` has the paper's lengths."""
    long, longer, convolutional = (100_000, 120_000, 100_000) if full else (20_000, 50_000, 1_000)
    circles = ("circles-mlp20", long)
    on_cnn = (("sgd-lgl2o-cnn",), ("sgd-lgl2o-cnn", "adam"))  # fallbacks, baselines
    return [
        Figure(
            *("fig03-start", "Fig. 3, start: the MLP's optimizer at home, MLP-20 on MNIST"),
            *("mnist-mlp20", 1_000, 2, BOTH),
            baselines=("sgd-lgl2o", "sgd", "adam"),
        ),
        Figure(
            *("behind", "Where LGL2O falls behind: the MLP's optimizer on MLP-20, FashionMNIST"),
            *("fashion-mlp20", 6_000, 10, BOTH),
            guards=(),
            more=with_losses,
        ),
        Figure(
            *("fig05", "Figs. 5 and 9: the MLP's optimizer on spirals, four fallbacks"),
            *("spirals-mlp20", longer, 50, MLP),
            baselines=("sgd-lgl2o", "sgd", "momentum", "adam"),
            fallbacks=("sgd-lgl2o", "momentum", "adam"),
            more=other,
        ),
        Figure("fig04", "Fig. 4: the MLP's optimizer on circles", *circles, 20, MLP, more=other),
        Figure(
            *("fig17-50", "Fig. 17: as fig. 4, windows of 50 steps", *circles, 4, MLP),
            guards=("lgl2o", "race"),
            window=50,
        ),
        Figure(
            *("fig17-100", "Fig. 17: as fig. 4, windows of 100 steps", *circles, 2, MLP),
            guards=("lgl2o", "race"),
            window=100,
        ),
        Figure(
            *("fig17-growing", "Fig. 17 on a stream: as fig. 4, per mini-batch, growing windows"),
            *("circles-mlp20", 2 * long, 40, MLP),
            guards=(),
            more=streams,
        ),
        Figure(
            *("fig06", "Fig. 6: the MLP's optimizer on CNN-3, MNIST"),
            *("mnist-cnn3", 1_000, 5, MLP, GUARDS, *on_cnn),
            more=other,
        ),
        Figure(
            *("fig07", "Fig. 7: the MLP's optimizer on CNN-3, FashionMNIST for CIFAR-10"),
            *("fashion-cnn3", 1_000, 5, MLP, GUARDS, *on_cnn),
            more=other,
        ),
        Figure(
            *("fig14", "Fig. 14: the CNN's optimizer on spirals"),
            *("spirals-mlp20", longer, 50, CNN),
        ),
        Figure("fig15", "Fig. 15: the CNN's optimizer on circles", *circles, 20, CNN),
        Figure(
            *("fig16", "Fig. 16: the CNN's optimizer at home, CNN-3 on FashionMNIST"),
            *("fashion-cnn3", convolutional, 5, BOTH_CNN, GUARDS, *on_cnn),
        ),
        Figure(
            *("fig13", "Fig. 13: the CNN's optimizer on CNN-3, MNIST"),
            *("mnist-cnn3", convolutional, 5, BOTH_CNN, GUARDS, *on_cnn),
        ),
        Figure(
            *("fig03", "Fig. 3: the MLP's optimizer at home, MLP-20 on MNIST"),
            *("mnist-mlp20", long, 50, BOTH),
        ),
        Figure(
            *("fig12", "Fig. 12: the CNN's optimizer on MLP-20, MNIST"),
            *("mnist-mlp20", long, 50, CNN),
        ),
    ]


SGD = "SGD (LGL2O's grid)"
LGL2O, GL2O, RACE = (f"{guard}(L2O, {SGD})" for guard in ("LGL2O", "GL2O", "RACE"))
LGL2O_300, GL2O_300, RACE_300 = (f"{g}(L2O-300, {SGD})" for g in ("LGL2O", "GL2O", "RACE"))
SGD_CNN = "SGD (LGL2O's grid, CNN)"
LGL2O_CNN_300 = f"LGL2O(L2O-300, {SGD_CNN})"
LGL2O_CNN, GL2O_CNN, RACE_CNN = (f"{g}(L2O, {SGD_CNN})" for g in ("LGL2O", "GL2O", "RACE"))
BOTH_DIVERGE = every(diverges("L2O"), diverges(GL2O_CNN))
IS_SGD = level(LGL2O_CNN, SGD_CNN)


def _race(panel: str, race: str = RACE, sgd: str = SGD) -> Claim:
    return Claim("ours", "race is never above SGD's own run", panel, best_of(race, sgd))


def _longer_is_below(panel: str) -> Claim:
    checks = (below("L2O-300", "L2O", step=step) for step in (100, 300, 1_000))
    return Claim("ours", "L2O-300 is below L2O from step 100 on", panel, every(*checks))


TUNED = "its decay is tuned for the length of the run; so it passes"
CLAIMS = (
    Claim("3", "L2O is the fastest at first", "fig03-start",
          every(below("L2O", SGD, "Adam", step=50), below("L2O", SGD, "Adam", step=100)),
          "Adam's rate is tuned on this task; L2O is ahead of it up to step 60, of SGD up to 150"),
    Claim("3", "L2O-300, meta-trained on longer runs, is the fastest over the first 300 steps",
          "fig03-start",
          every(*(below("L2O-300", SGD, "Adam", step=step) for step in (20, 50, 100, 200, 300)))),
    Claim("ours", "so is LGL2O around it, and later level with the better of both", "fig03-start",
          every(*(below(LGL2O_300, SGD, "Adam", step=step) for step in (20, 50, 100, 200, 300)),
                best_of(LGL2O_300, "L2O-300", SGD))),
    Claim("3", "early on L2O < GL2O < SGD in loss", "fig03-start",
          every(below("L2O", GL2O, step=100), below(GL2O, SGD, step=100))),
    Claim("3", "L2O turns around at about step 1000", "fig03", rises("L2O")),
    Claim("3", "LGL2O is never above the better of L2O and SGD", "fig03",
          best_of(LGL2O, "L2O", SGD),
          "it falls behind SGD's own run, as on FashionMNIST below; race does not"),
    Claim("3", "LGL2O uses L2O first, later both", "fig03", switches(LGL2O),
          "L2O is ahead of tuned SGD for 150 steps, 15 of the first 40 windows"),
    Claim("3", "around L2O-300 LGL2O is never above the better of both", "fig03",
          best_of(LGL2O_300, "L2O-300", SGD),
          "below both at steps 500 and 1000; later it falls behind SGD's own run, 5% at the end"),
    Claim("3", "there it uses L2O-300 first, later both", "fig03", switches(LGL2O_300),
          "L2O-300 wins all windows of the first 40 steps, half at step 200, none from 2000 on"),
    Claim("ours", "GL2O around it is never above the better of both", "fig03",
          best_of(GL2O_300, "L2O-300", SGD)),
    Claim("3", "GL2O does not diverge", "fig03", never_diverges(GL2O)),
    _race("fig03"),
    Claim("ours", "nor above L2O's", "fig03", best_of(RACE, "L2O")),
    Claim("ours", "on FashionMNIST LGL2O falls behind SGD's own run, race does not", "behind",
          every(below(SGD, LGL2O), best_of(RACE, SGD))),
    Claim("ours", "so they do around L2O-300, which is the better optimizer", "behind",
          every(below(SGD, LGL2O_300), best_of(RACE_300, SGD), below("L2O-300", "L2O"))),
    Claim("4", "early on LGL2O is as fast as L2O, GL2O slower", "fig04",
          every(level(LGL2O, "L2O", step=500), below("L2O", GL2O, step=500))),
    Claim("4", "L2O turns around later; GL2O does not diverge", "fig04",
          every(rises("L2O"), never_diverges(GL2O))),
    Claim("4", "LGL2O starts to rise after some 20 000 steps", "fig04", rises(LGL2O)),
    Claim("ours", "L2O-300 starts more slowly there, and ends below", "fig04",
          every(below("L2O", "L2O-300", step=600), below("L2O-300", "L2O"))),
    Claim("ours", "on spirals it is behind L2O throughout", "fig05",
          every(*(below("L2O", "L2O-300", step=step) for step in (1_000, 5_000, 50_000)))),
    Claim("5", "SGD stays at a local optimum for ever", "fig05", stuck(SGD), TUNED),
    Claim("5", "all variants of L2O leave it sooner", "fig05",
          every(*(below(name, SGD, step=3_000) for name in ("L2O", LGL2O, GL2O)))),
    Claim("5", "LGL2O is as fast as L2O, GL2O slower", "fig05",
          every(level(LGL2O, "L2O", step=5_000), below("L2O", GL2O, step=5_000))),
    Claim("5", "in the end LGL2O is below both L2O and SGD", "fig05", below(LGL2O, "L2O", SGD)),
    Claim("9", "Adam is a better fallback than SGD", "fig05", below("LGL2O(L2O, Adam)", LGL2O)),
    Claim("9", "tuned Adam wins in the long run, LGL2O early", "fig05",
          every(below("Adam", LGL2O), below(LGL2O, "Adam", step=1_000))),
    Claim("6", "L2O and GL2O diverge quickly on a CNN", "fig06",
          BOTH_DIVERGE,
          "ours turns around after 200 steps, and stays far below its start"),
    Claim("6", "there LGL2O is SGD", "fig06", IS_SGD,
          "it follows L2O, whose windows win while SGD's run, far ahead, is lost; race keeps it"),
    _longer_is_below("fig06"),
    _race("fig06", RACE_CNN, SGD_CNN),
    Claim("7", "L2O and GL2O diverge to a high loss", "fig07",
          BOTH_DIVERGE,
          "as in figure 6: ours turns around after 200 steps; GL2O is SGD from the start"),
    Claim("7", "LGL2O is SGD from the start", "fig07", IS_SGD,
          "it follows L2O, which is ahead of SGD up to step 200, and then is lost with it"),
    _longer_is_below("fig07"),
    _race("fig07", RACE_CNN, SGD_CNN),
    Claim("12", "L2O is stable for long, LGL2O reaches a better loss", "fig12",
          every(never_diverges("L2O"), below(LGL2O, "L2O")),
          "our CNN's optimizer fails on this MLP from the start; the paper's lasts 100 000 steps"),
    Claim("13", "L2O diverges on the other data, GL2O counters it", "fig13",
          every(diverges("L2O"), never_diverges(GL2O_CNN))),
    Claim("13", "LGL2O is far below both of its parts", "fig13",
          below(LGL2O_CNN, "L2O", SGD_CNN), "it falls to chance, as in figure 16"),
    Claim("ours", "L2O-300 is ahead of SGD and Adam on the other data too, at steps 200 and 300, "
          "and does not diverge", "fig13",
          every(*(below("L2O-300", SGD_CNN, "Adam", step=step) for step in (200, 300)),
                never_diverges("L2O-300"))),
    Claim("13", "around L2O-300 LGL2O is never above the better of both, and ends below both",
          "fig13",
          every(best_of(LGL2O_CNN_300, "L2O-300", SGD_CNN),
                below(LGL2O_CNN_300, "L2O-300", SGD_CNN))),
    _race("fig13", RACE_CNN, SGD_CNN),
    Claim("14", "SGD and GL2O are stuck", "fig14", every(stuck(SGD), stuck(GL2O)), TUNED),
    Claim("14", "L2O and LGL2O pass", "fig14",
          every(below("L2O", SGD, GL2O, step=3_000), below(LGL2O, SGD, GL2O, step=3_000))),
    Claim("14", "L2O stops on a plateau, LGL2O ends below it", "fig14", below(LGL2O, "L2O")),
    _race("fig14"),
    Claim("15", "all learned ones are faster than SGD, GL2O the slowest of them", "fig15",
          every(below(GL2O, SGD, step=1_000), below("L2O", GL2O, step=1_000))),
    _race("fig15"),
    Claim("16", "LGL2O is the best and does not become unstable", "fig16",
          every(below(LGL2O_CNN, "L2O", SGD_CNN), never_diverges(LGL2O_CNN)),
          "it falls to chance, as in Meta Guard's figure 1 a; the paper's SGD has a rate of 1e-4"),
    Claim("ours", "L2O-300, from the MLP's and on longer runs, is below SGD to the end, level with "
          "Adam to step 300", "fig16",
          every(*(below("L2O-300", SGD_CNN, step=step) for step in (100, 300, 500, 1_000)),
                *(level("L2O-300", "Adam", step=step) for step in (200, 300)))),
    Claim("ours", "around it LGL2O is never above the better of both, nor unstable",
          "fig16",
          every(best_of(LGL2O_CNN_300, "L2O-300", SGD_CNN), never_diverges(LGL2O_CNN_300))),
    _race("fig16", RACE_CNN, SGD_CNN),
    Claim("17", "with windows of 100 steps LGL2O does not rise late", "fig17-100",
          negated(rises(LGL2O))),
    Claim("17", "nor with windows that grow when the losses cannot be told apart", "fig17-growing",
          every(negated(rises("LGL2O, growing (std)")), negated(rises("LGL2O, growing (paired)")))),
    Claim("ours", "growing windows end as low as those of 10 and of 100", "fig17-growing",
          every(level("LGL2O, growing (paired)", "LGL2O, windows of 100"),
                level("LGL2O, growing (paired)", "LGL2O, windows of 10")),
          "they grow within 2000 steps; of such windows L2O wins 1%, of those of 10 a fifth"),
)  # fmt: skip

PAPER = Reproduction(
    "LGL2O, figures 3 to 17", figures, seeds=(5, 5), out=Path("docs/results/lgl2o")
)

if __name__ == "__main__":
    main(PAPER, "experiments.lgl2o")
