"""Reproduces LGL2O (Premont-Schwarz et al. 2022): figures 3 to 7, 9 and 12 to 17.

The paper's claims: a learned optimizer is fast at first, on its own task and on some others, and
diverges later or elsewhere. Under LGL2O it keeps the fast start and does not diverge. GL2O is
slower. `race`, our own guard, runs beside them.

    make reproduce-lgl2o      # or: python -m experiments.lgl2o [--only fig03] [--full]

Needs MNIST and FashionMNIST (docs/data.md). Takes about 3 hours on 2 cores: the records sum up to
5.1 hours of one core, without compilation. Writes the records of every figure to
docs/results/lgl2o; `experiments.verdicts` decides the claims on them.

Differences from the paper:

- The first optimizer is meta-trained on MLP-20 and MNIST, as in the paper. The second one is
  meta-trained on CNN-3 and FashionMNIST instead of CIFAR-10, whose files are not available here.
  Figures 7 and 16 use FashionMNIST instead of CIFAR-10 too.
- Figure 8 needs the files of TinyImageNet and is left out.
- Runs have 20 000 to 50 000 steps (CNNs: 1 000), where the paper has up to 120 000. ``--full`` has
  the paper's lengths.
- On its home task and some others, each optimizer has an L2O-300 beside it: an optimizer that is
  meta-trained on runs of up to 300 steps (CNN) or 400 steps, with a recipe of ours
  (docs/meta-training.md).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import metaopt
from experiments.checks import (
    Check,
    Claim,
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
from experiments.reproduction import Figure, Reproduction, TunedBaselines, main
from metaopt import guards
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.contenders import (
    PAPER_RACE,
    Contender,
    Learned,
    from_export,
    guarded,
    plain,
)

# The optimizers that a figure compares: the paper's name -> the name in the zoo.
MLP = {"L2O": "lstm-mlp-mnist"}
MLP_BOTH = {"L2O": "lstm-mlp-mnist", "L2O-300": "lstm-mlp-mnist-300"}
CNN = {"L2O": "lstm-cnn-fmnist"}
CNN_BOTH = {"L2O": "lstm-cnn-fmnist", "L2O-300": "lstm-cnn-fmnist-300"}

# Names in the records.
SGD = "SGD (LGL2O's grid)"
LGL2O = f"LGL2O(L2O, {SGD})"
LGL2O_300 = f"LGL2O(L2O-300, {SGD})"
GL2O = f"GL2O(L2O, {SGD})"
GL2O_300 = f"GL2O(L2O-300, {SGD})"
RACE = f"RACE(L2O, {SGD})"
RACE_300 = f"RACE(L2O-300, {SGD})"
SGD_CNN = "SGD (LGL2O's grid, CNN)"
LGL2O_CNN = f"LGL2O(L2O, {SGD_CNN})"
LGL2O_CNN_300 = f"LGL2O(L2O-300, {SGD_CNN})"
GL2O_CNN = f"GL2O(L2O, {SGD_CNN})"
RACE_CNN = f"RACE(L2O, {SGD_CNN})"


def figures(full: bool) -> list[Figure]:
    """The figures, in the order of the report.

    Args:
      full: whether runs have the paper's lengths.
    """
    steps = 100_000 if full else 20_000
    steps_spirals = 120_000 if full else 50_000
    steps_cnn = 100_000 if full else 1_000
    return [
        Figure(
            name="fig03-start",
            title="Fig. 3, start: the MLP's optimizer at home, MLP-20 on MNIST",
            task="mnist-mlp20",
            num_steps=1_000,
            measure_every=2,
            learned=MLP_BOTH,
            baselines=("sgd-lgl2o", "sgd", "adam"),
        ),
        Figure(
            name="behind",
            title="Where LGL2O falls behind: the MLP's optimizer on MLP-20, FashionMNIST",
            task="fashion-mlp20",
            num_steps=6_000,
            measure_every=10,
            learned=MLP_BOTH,
            guards=(),
            extra_contenders=guards_with_losses,
        ),
        Figure(
            name="fig05",
            title="Figs. 5 and 9: the MLP's optimizer on spirals, four fallbacks",
            task="spirals-mlp20",
            num_steps=steps_spirals,
            measure_every=50,
            learned=MLP,
            fallbacks=("sgd-lgl2o", "momentum", "adam"),
            baselines=("sgd-lgl2o", "sgd", "momentum", "adam"),
            extra_contenders=unguarded_l2o_300,
        ),
        Figure(
            name="fig04",
            title="Fig. 4: the MLP's optimizer on circles",
            task="circles-mlp20",
            num_steps=steps,
            measure_every=20,
            learned=MLP,
            extra_contenders=unguarded_l2o_300,
        ),
        Figure(
            name="fig17-50",
            title="Fig. 17: as fig. 4, windows of 50 steps",
            task="circles-mlp20",
            num_steps=steps,
            measure_every=4,
            learned=MLP,
            guards=("lgl2o", "race"),
            window=50,
        ),
        Figure(
            name="fig17-100",
            title="Fig. 17: as fig. 4, windows of 100 steps",
            task="circles-mlp20",
            num_steps=steps,
            measure_every=2,
            learned=MLP,
            guards=("lgl2o", "race"),
            window=100,
        ),
        Figure(
            name="fig17-growing",
            title="Fig. 17 on a stream: as fig. 4, per mini-batch, growing windows",
            task="circles-mlp20",
            num_steps=2 * steps,
            measure_every=40,
            learned=MLP,
            guards=(),
            extra_contenders=streaming_guards,
        ),
        Figure(
            name="fig06",
            title="Fig. 6: the MLP's optimizer on CNN-3, MNIST",
            task="mnist-cnn3",
            num_steps=1_000,
            measure_every=5,
            learned=MLP,
            fallbacks=("sgd-lgl2o-cnn",),
            baselines=("sgd-lgl2o-cnn", "adam"),
            extra_contenders=unguarded_l2o_300,
        ),
        Figure(
            name="fig07",
            title="Fig. 7: the MLP's optimizer on CNN-3, FashionMNIST for CIFAR-10",
            task="fashion-cnn3",
            num_steps=1_000,
            measure_every=5,
            learned=MLP,
            fallbacks=("sgd-lgl2o-cnn",),
            baselines=("sgd-lgl2o-cnn", "adam"),
            extra_contenders=unguarded_l2o_300,
        ),
        Figure(
            name="fig14",
            title="Fig. 14: the CNN's optimizer on spirals",
            task="spirals-mlp20",
            num_steps=steps_spirals,
            measure_every=50,
            learned=CNN,
        ),
        Figure(
            name="fig15",
            title="Fig. 15: the CNN's optimizer on circles",
            task="circles-mlp20",
            num_steps=steps,
            measure_every=20,
            learned=CNN,
        ),
        Figure(
            name="fig16",
            title="Fig. 16: the CNN's optimizer at home, CNN-3 on FashionMNIST",
            task="fashion-cnn3",
            num_steps=steps_cnn,
            measure_every=5,
            learned=CNN_BOTH,
            fallbacks=("sgd-lgl2o-cnn",),
            baselines=("sgd-lgl2o-cnn", "adam"),
        ),
        Figure(
            name="fig13",
            title="Fig. 13: the CNN's optimizer on CNN-3, MNIST",
            task="mnist-cnn3",
            num_steps=steps_cnn,
            measure_every=5,
            learned=CNN_BOTH,
            fallbacks=("sgd-lgl2o-cnn",),
            baselines=("sgd-lgl2o-cnn", "adam"),
        ),
        Figure(
            name="fig03",
            title="Fig. 3: the MLP's optimizer at home, MLP-20 on MNIST",
            task="mnist-mlp20",
            num_steps=steps,
            measure_every=50,
            learned=MLP_BOTH,
        ),
        Figure(
            name="fig12",
            title="Fig. 12: the CNN's optimizer on MLP-20, MNIST",
            task="mnist-mlp20",
            num_steps=steps,
            measure_every=50,
            learned=CNN,
        ),
    ]


def unguarded_l2o_300(learned: Sequence[Learned], tuned: TunedBaselines) -> list[Contender]:
    """The MLP's L2O-300, without a guard."""
    del learned, tuned
    return [plain(from_export("L2O-300", metaopt.load(MLP_BOTH["L2O-300"])))]


def guards_with_losses(learned: Sequence[Learned], tuned: TunedBaselines) -> list[Contender]:
    """LGL2O and race; the losses of both candidates are recorded at every decision."""
    entries = []
    for optimizer in learned:
        for guard in ("lgl2o", "race"):
            contender = guarded(
                optimizer,
                guard,
                fallback=BASELINES["sgd-lgl2o"].label,
                make=tuned["sgd-lgl2o"],
                window=10,
                as_in_papers=True,
            )
            entries.append(contender._replace(fields=("accepted", "losses")))
    return entries


def streaming_guards(learned: Sequence[Learned], tuned: TunedBaselines) -> list[Contender]:
    """Guards on a stream of mini-batches, with windows of a fixed size and of growing sizes.

    Only on a stream may sizes differ from seed to seed. Every second mini-batch validates, so a
    guard takes half as many optimizer steps as the x-axis counts mini-batches.
    """
    (l2o,) = learned
    sgd = tuned["sgd-lgl2o"]

    def contender(name: str, guard_name: str, make_guard: Callable[[Any, Any], Any]) -> Contender:
        def make(num_batches):
            return make_guard(l2o.make(num_batches // 2), sgd(num_batches // 2))

        return Contender(
            name=name,
            kind="guarded",
            make=make,
            fields=("accepted", "n_t"),
            learned=l2o,
            guard_name=guard_name,
            fallback=SGD,
        )

    def fixed(size: int) -> Callable[[Any, Any], Any]:
        return lambda learned, fallback: guards.lgl2o(learned, fallback, n_t=size, n_c=size)

    def race(learned: Any, fallback: Any) -> guards.Guard:
        return guards.race(learned, fallback, n_t=10, n_c=10, **PAPER_RACE)

    def growing(rule: Any) -> Callable[[Any, Any], Any]:
        adaptive = guards.Adaptive(rule=rule, cap=160)
        return lambda learned, fallback: guards.lgl2o(learned, fallback, adaptive=adaptive)

    return [
        contender("LGL2O, windows of 10", "lgl2o", fixed(10)),
        contender("LGL2O, windows of 100", "lgl2o", fixed(100)),
        contender("LGL2O, growing (std)", "lgl2o", growing("std")),
        contender("LGL2O, growing (paired)", "lgl2o", growing("paired")),
        contender("RACE, windows of 10", "race", race),
    ]


def below_at(steps: Sequence[int], name: str, *others: str) -> list[Check]:
    """One check per step: `name` has a lower loss than each of the others."""
    return [below(name, *others, step=step) for step in steps]


def race_is_safe(figure: str, race: str = RACE, sgd: str = SGD) -> Claim:
    """Our own claim about `race`, on one of the figures."""
    return Claim(
        source="ours",
        text="race is never above SGD's own run",
        figure=figure,
        check=best_of(race, sgd),
    )


def longer_meta_training_pays(figure: str) -> Claim:
    """Our own claim about L2O-300, on one of the figures."""
    return Claim(
        source="ours",
        text="L2O-300 is below L2O from step 100 on",
        figure=figure,
        check=every(*below_at((100, 300, 1_000), "L2O-300", "L2O")),
    )


L2O_AND_GL2O_DIVERGE = every(diverges("L2O"), diverges(GL2O_CNN))
LGL2O_IS_SGD = level(LGL2O_CNN, SGD_CNN)
TUNED = "SGD's decay is tuned for the length of the run, and SGD leaves the local optimum"
CLAIMS = (
    Claim(
        source="3",
        text="L2O is the fastest at first",
        figure="fig03-start",
        check=every(below("L2O", SGD, "Adam", step=50), below("L2O", SGD, "Adam", step=100)),
        reason=(
            "Adam is tuned on this task; L2O is ahead of it up to step 60, and ahead of SGD up "
            "to step 150"
        ),
    ),
    Claim(
        source="3",
        text="L2O-300, meta-trained on longer runs, is the fastest over the first 300 steps",
        figure="fig03-start",
        check=every(*below_at((20, 50, 100, 200, 300), "L2O-300", SGD, "Adam")),
    ),
    Claim(
        source="ours",
        text=(
            "LGL2O around L2O-300 is the fastest too, and later level with the better of "
            "L2O-300 and SGD"
        ),
        figure="fig03-start",
        check=every(
            *below_at((20, 50, 100, 200, 300), LGL2O_300, SGD, "Adam"),
            best_of(LGL2O_300, "L2O-300", SGD),
        ),
    ),
    Claim(
        source="3",
        text="early on, the losses are in the order L2O < GL2O < SGD",
        figure="fig03-start",
        check=every(below("L2O", GL2O, step=100), below(GL2O, SGD, step=100)),
    ),
    Claim(
        source="3",
        text="the loss of L2O rises again from about step 1000",
        figure="fig03",
        check=rises("L2O"),
    ),
    Claim(
        source="3",
        text="LGL2O is never above the better of L2O and SGD",
        figure="fig03",
        check=best_of(LGL2O, "L2O", SGD),
        reason="LGL2O falls behind SGD's own run, as on FashionMNIST below; race does not",
    ),
    Claim(
        source="3",
        text="LGL2O uses L2O at first, and both later",
        figure="fig03",
        check=switches(LGL2O),
        reason="L2O is ahead of tuned SGD for 150 steps, which are 15 of the first 40 windows",
    ),
    Claim(
        source="3",
        text="LGL2O around L2O-300 is never above the better of L2O-300 and SGD",
        figure="fig03",
        check=best_of(LGL2O_300, "L2O-300", SGD),
        reason=(
            "LGL2O is below both at steps 500 and 1000; later it falls behind SGD's own run, by"
            " 5% at the end"
        ),
    ),
    Claim(
        source="3",
        text="LGL2O around L2O-300 uses L2O-300 at first, and both later",
        figure="fig03",
        check=switches(LGL2O_300),
        reason=(
            "L2O-300 wins all windows of the first 40 steps, half of them at step 200, and none"
            " from step 2000 on"
        ),
    ),
    Claim(
        source="ours",
        text="GL2O around L2O-300 is never above the better of L2O-300 and SGD",
        figure="fig03",
        check=best_of(GL2O_300, "L2O-300", SGD),
    ),
    Claim(
        source="3",
        text="GL2O does not diverge",
        figure="fig03",
        check=never_diverges(GL2O),
    ),
    race_is_safe("fig03"),
    Claim(
        source="ours",
        text="race is never above L2O",
        figure="fig03",
        check=best_of(RACE, "L2O"),
    ),
    Claim(
        source="ours",
        text="on FashionMNIST LGL2O falls behind SGD's own run; race does not",
        figure="behind",
        check=every(below(SGD, LGL2O), best_of(RACE, SGD)),
    ),
    Claim(
        source="ours",
        text="the same holds around L2O-300, which ends below L2O",
        figure="behind",
        check=every(below(SGD, LGL2O_300), best_of(RACE_300, SGD), below("L2O-300", "L2O")),
    ),
    Claim(
        source="4",
        text="early on, LGL2O is as fast as L2O, and GL2O is slower",
        figure="fig04",
        check=every(level(LGL2O, "L2O", step=500), below("L2O", GL2O, step=500)),
    ),
    Claim(
        source="4",
        text="the loss of L2O rises later; GL2O does not diverge",
        figure="fig04",
        check=every(rises("L2O"), never_diverges(GL2O)),
    ),
    Claim(
        source="4",
        text="the loss of LGL2O rises after some 20 000 steps",
        figure="fig04",
        check=rises(LGL2O),
    ),
    Claim(
        source="ours",
        text="L2O-300 is slower than L2O at first, and ends below it",
        figure="fig04",
        check=every(below("L2O", "L2O-300", step=600), below("L2O-300", "L2O")),
    ),
    Claim(
        source="ours",
        text="on spirals L2O-300 is behind L2O throughout",
        figure="fig05",
        check=every(*below_at((1_000, 5_000, 50_000), "L2O", "L2O-300")),
    ),
    Claim(
        source="5",
        text="SGD never leaves a local optimum",
        figure="fig05",
        check=stuck(SGD),
        reason=TUNED,
    ),
    Claim(
        source="5",
        text="L2O, LGL2O and GL2O leave the local optimum sooner than SGD",
        figure="fig05",
        check=every(*(below(name, SGD, step=3_000) for name in ("L2O", LGL2O, GL2O))),
    ),
    Claim(
        source="5",
        text="LGL2O is as fast as L2O, and GL2O is slower",
        figure="fig05",
        check=every(level(LGL2O, "L2O", step=5_000), below("L2O", GL2O, step=5_000)),
    ),
    Claim(
        source="5",
        text="LGL2O ends below both L2O and SGD",
        figure="fig05",
        check=below(LGL2O, "L2O", SGD),
    ),
    Claim(
        source="9",
        text="Adam is a better fallback than SGD",
        figure="fig05",
        check=below("LGL2O(L2O, Adam)", LGL2O),
    ),
    Claim(
        source="9",
        text="tuned Adam is ahead of LGL2O in the long run, and behind it early on",
        figure="fig05",
        check=every(below("Adam", LGL2O), below(LGL2O, "Adam", step=1_000)),
    ),
    Claim(
        source="6",
        text="L2O and GL2O diverge quickly on a CNN",
        figure="fig06",
        check=L2O_AND_GL2O_DIVERGE,
        reason="the loss of our L2O rises after 200 steps, and stays far below its start",
    ),
    Claim(
        source="6",
        text="on a CNN LGL2O is equal to SGD",
        figure="fig06",
        check=LGL2O_IS_SGD,
        reason=(
            "LGL2O follows L2O, whose windows win; SGD's own run, which is far ahead, is lost. "
            "race keeps it"
        ),
    ),
    longer_meta_training_pays("fig06"),
    race_is_safe("fig06", race=RACE_CNN, sgd=SGD_CNN),
    Claim(
        source="7",
        text="L2O and GL2O diverge to a high loss",
        figure="fig07",
        check=L2O_AND_GL2O_DIVERGE,
        reason="as in figure 6: our L2O rises after 200 steps; GL2O is equal to SGD from the start",
    ),
    Claim(
        source="7",
        text="LGL2O is equal to SGD from the start",
        figure="fig07",
        check=LGL2O_IS_SGD,
        reason="LGL2O follows L2O, which is ahead of SGD up to step 200, and then fails with it",
    ),
    longer_meta_training_pays("fig07"),
    race_is_safe("fig07", race=RACE_CNN, sgd=SGD_CNN),
    Claim(
        source="12",
        text="L2O is stable for a long time, and LGL2O reaches a lower loss",
        figure="fig12",
        check=every(never_diverges("L2O"), below(LGL2O, "L2O")),
        reason=(
            "our CNN's optimizer fails on this MLP from the start; the paper's is stable for "
            "100 000 steps"
        ),
    ),
    Claim(
        source="13",
        text="L2O diverges on the other data, and GL2O prevents it",
        figure="fig13",
        check=every(diverges("L2O"), never_diverges(GL2O_CNN)),
    ),
    Claim(
        source="13",
        text="LGL2O ends far below both L2O and SGD",
        figure="fig13",
        check=below(LGL2O_CNN, "L2O", SGD_CNN),
        reason="LGL2O falls to chance, as in figure 16",
    ),
    Claim(
        source="ours",
        text=(
            "on the other data too, L2O-300 is ahead of SGD and Adam at steps 200 and 300, and "
            "does not diverge"
        ),
        figure="fig13",
        check=every(
            *below_at((200, 300), "L2O-300", SGD_CNN, "Adam"),
            never_diverges("L2O-300"),
        ),
    ),
    Claim(
        source="13",
        text=(
            "LGL2O around L2O-300 is never above the better of L2O-300 and SGD, and ends below both"
        ),
        figure="fig13",
        check=every(
            best_of(LGL2O_CNN_300, "L2O-300", SGD_CNN), below(LGL2O_CNN_300, "L2O-300", SGD_CNN)
        ),
    ),
    race_is_safe("fig13", race=RACE_CNN, sgd=SGD_CNN),
    Claim(
        source="14",
        text="SGD and GL2O never leave a local optimum",
        figure="fig14",
        check=every(stuck(SGD), stuck(GL2O)),
        reason=TUNED,
    ),
    Claim(
        source="14",
        text="L2O and LGL2O leave it",
        figure="fig14",
        check=every(below("L2O", SGD, GL2O, step=3_000), below(LGL2O, SGD, GL2O, step=3_000)),
    ),
    Claim(
        source="14",
        text="L2O stops on a plateau, and LGL2O ends below it",
        figure="fig14",
        check=below(LGL2O, "L2O"),
    ),
    race_is_safe("fig14"),
    Claim(
        source="15",
        text="all learned optimizers are faster than SGD, and GL2O is the slowest of them",
        figure="fig15",
        check=every(below(GL2O, SGD, step=1_000), below("L2O", GL2O, step=1_000)),
    ),
    race_is_safe("fig15"),
    Claim(
        source="16",
        text="LGL2O is the best, and stays stable",
        figure="fig16",
        check=every(below(LGL2O_CNN, "L2O", SGD_CNN), never_diverges(LGL2O_CNN)),
        reason=(
            "LGL2O falls to chance, as in figure 1 a of Meta Guard; the paper's SGD has a rate "
            "of 1e-4"
        ),
    ),
    Claim(
        source="ours",
        text=(
            "L2O-300, which starts from the MLP's and is meta-trained on longer runs, is below "
            "SGD to the end, and level with Adam up to step 300"
        ),
        figure="fig16",
        check=every(
            *below_at((100, 300, 500, 1_000), "L2O-300", SGD_CNN),
            *(level("L2O-300", "Adam", step=step) for step in (200, 300)),
        ),
    ),
    Claim(
        source="ours",
        text="LGL2O around L2O-300 is never above the better of L2O-300 and SGD, and stays stable",
        figure="fig16",
        check=every(best_of(LGL2O_CNN_300, "L2O-300", SGD_CNN), never_diverges(LGL2O_CNN_300)),
    ),
    race_is_safe("fig16", race=RACE_CNN, sgd=SGD_CNN),
    Claim(
        source="17",
        text="with windows of 100 steps the loss of LGL2O does not rise late",
        figure="fig17-100",
        check=negated(rises(LGL2O)),
    ),
    Claim(
        source="17",
        text="nor does it with windows that grow when the two losses cannot be told apart",
        figure="fig17-growing",
        check=every(
            negated(rises("LGL2O, growing (std)")), negated(rises("LGL2O, growing (paired)"))
        ),
    ),
    Claim(
        source="ours",
        text="growing windows end as low as windows of 10 and of 100",
        figure="fig17-growing",
        check=every(
            level("LGL2O, growing (paired)", "LGL2O, windows of 100"),
            level("LGL2O, growing (paired)", "LGL2O, windows of 10"),
        ),
        reason=(
            "they grow within 2000 steps; L2O wins 1% of the grown windows, and a fifth of "
            "those of 10"
        ),
    ),
)

PAPER = Reproduction(
    title="LGL2O, figures 3 to 17",
    figures=figures,
    seeds=5,
    seeds_full=5,
    out=Path("docs/results/lgl2o"),
)

if __name__ == "__main__":
    main(PAPER, "experiments.lgl2o")
