"""Reproduces L3RS (2026): figures 3 to 6, and tables 2 to 4 (the ablations).

The paper's claims: within its horizon L3RS is ahead of VeLO(ft) and of tuned Adam. Beyond it, L3RS
is comparable to Adam, and VeLO(ft) drops. Other data or another pretraining change little. From a
random initialisation (E) L3RS does not beat the baselines. Its meta-training is good soon, that of
VeLO(ft) late. Ablations of base sets, embeddings and averages support its design.

    make reproduce-l3rs       # or: python -m experiments.l3rs [--only A] [--full]

Needs MNIST and FashionMNIST (docs/data.md). Takes some hours on 2 cores, most of them for 14
meta-trainings; the runs themselves sum up to 0.6 hours of one core in the records. Writes the
records of every figure to docs/results/l3rs; `experiments.verdicts` decides the claims on them.

Differences from the paper:

- CNN-3, pretrained on half of the 20 classes of MNIST and FashionMNIST together (or on
  scikit-learn's digits), where the paper has ResNets on ImageNet; 3-way tasks; 10 seeds.
- The optimizers are those of the zoo; VeLO is trained from scratch instead of from the published
  weights. Figure 6 has two meta-trainings of each (``--only trainings``).
- The ablations are meta-trained here for 400 generations each (``--full``: 1000), and run on 40
  tasks.
"""

import dataclasses
from pathlib import Path

from experiments.checks import (
    Claim,
    ahead,
    below,
    decays,
    every,
    faster,
    gains,
    mostly,
    negated,
    rises,
    settles,
    steadier,
)
from experiments.reproduction import Figure, Reproduction, main
from experiments.zoo import RECIPES
from metaopt import optimizers
from metaopt.evaluation.comparing import slug
from metaopt.jobs.train import TrainJob

# Names in the records.
L3RS = "L3RS"
VELO = "VeLO(ft)"
ADAMS = ("Adam", "Adam (L3RS's grid)", "Adam (head only)")
UNCHANGED = "L3RS as it is"  # the reference of the ablations

LEARNED = {L3RS: "l3rs-finetune-cnn", VELO: "velo-small"}  # -> the name in the zoo
BASELINES = ("sgd", "adam", "adam-l3rs", "adam-l3rs-head")

# Label -> settings of L3RS. As it is, it has SGD and Adam, an embedding, three averages.
ABLATIONS = {
    UNCHANGED: optimizers.L3RS(),
    "SGD alone": optimizers.L3RS(base=("sgd",)),
    "Adam alone": optimizers.L3RS(base=("adam",)),
    "SGD, Adam, Lion": optimizers.L3RS(base=("sgd", "adam", "lion")),
    "no embedding": optimizers.L3RS(variant="none"),
    "a network per layer": optimizers.L3RS(variant="per_layer"),
    "one network for all": optimizers.L3RS(variant="global"),
    "one average": optimizers.L3RS(ema="one"),
    "raw features": optimizers.L3RS(ema="raw"),
    "no features": optimizers.L3RS(ema="none"),
}


def ablation(label: str, full: bool) -> TrainJob:
    """The zoo's meta-training of L3RS with the settings of an ablation."""
    (job,) = RECIPES[LEARNED[L3RS]].jobs
    folder = f"{slug(label)}-full" if full else slug(label)
    return dataclasses.replace(
        job,
        learned=ABLATIONS[label],
        steps=1000 if full else 400,
        out=Path("runs/l3rs-ablations") / folder,
    )


def fine_tuning(name: str, *, title: str, task: str, num_steps: int = 100) -> Figure:
    """One panel of figure 3: the optimizers of the zoo and tuned baselines on few-class tasks."""
    return Figure(
        name=name,
        title=f"Fig. 3 {name}: {title}",
        task=task,
        num_steps=num_steps,
        measure_every=1,
        learned=LEARNED,
        guards=("race",),
        fallbacks=("adam",),
        baselines=BASELINES,
    )


def figures(full: bool) -> list[Figure]:
    """The figures, in the order of the report.

    Args:
      full: whether the ablations are meta-trained for longer. Numbers of steps are the same.
    """
    return [
        fine_tuning("A", title="new classes", task="finetune-A"),
        fine_tuning("A-10", title="new classes, 10 steps", task="finetune-A", num_steps=10),
        fine_tuning(
            "A-500", title="new classes, beyond the horizon", task="finetune-A", num_steps=500
        ),
        fine_tuning("B", title="other data", task="finetune-B"),
        fine_tuning("C", title="other pretraining", task="finetune-C"),
        fine_tuning("D", title="other data and pretraining", task="finetune-D"),
        fine_tuning("E", title="no pretraining", task="finetune-E"),
        Figure(
            name="F",
            title="Fig. 3 F: steps to a loss; figs. 4, 5: dynamics",
            task="finetune-A",
            num_steps=100,
            measure_every=1,
            learned=LEARNED,
            guards=(),
            fallbacks=(),
            baselines=BASELINES,
            window=1,
        ),
        Figure(
            name="ablations",
            title="Tables 2 to 4: ablations",
            task="finetune-A",
            num_steps=100,
            measure_every=1,
            learned={label: ablation(label, full) for label in ABLATIONS},
            guards=(),
            fallbacks=(),
            baselines=("adam",),
            seeds=40,
        ),
    ]


def trainings(full: bool) -> dict[str, TrainJob]:
    """Figure 6: the zoo's meta-trainings, each with several seeds."""
    jobs = {}
    for name, source in LEARNED.items():
        (job,) = RECIPES[source].jobs
        for seed in range(5 if full else 2):
            out = Path(f"runs/l3rs-trainings/{slug(name)}-{seed}")
            jobs[f"{name}, seed {seed}"] = dataclasses.replace(job, seed=seed, out=out)
    return jobs


CLAIMS = (
    Claim(
        source="3 A",
        text="within the horizon, at 100 steps, L3RS is ahead of VeLO(ft)",
        figure="A",
        check=below(L3RS, VELO),
    ),
    Claim(
        source="3 A",
        text="within the horizon, at 10 steps, L3RS is ahead of VeLO(ft)",
        figure="A-10",
        check=below(L3RS, VELO),
    ),
    Claim(
        source="3 A",
        text="within the horizon, at 100 steps, L3RS is ahead of all Adams",
        figure="A",
        check=below(L3RS, *ADAMS),
    ),
    Claim(
        source="3 A",
        text="within the horizon, at 10 steps, L3RS is ahead of all Adams",
        figure="A-10",
        check=below(L3RS, *ADAMS),
    ),
    Claim(
        source="3 A",
        text="beyond the horizon L3RS is comparable to Adam",
        figure="A-500",
        check=negated(below("Adam", L3RS)),
        reason="L3RS ends below Adam",
    ),
    Claim(
        source="3 A",
        text="beyond the horizon VeLO(ft) becomes worse",
        figure="A-500",
        check=rises(VELO),
    ),
    Claim(
        source="3 B",
        text="the same order: L3RS is ahead of VeLO(ft) and of all Adams",
        figure="B",
        check=below(L3RS, VELO, *ADAMS),
    ),
    Claim(
        source="3 C",
        text="the same order: L3RS is ahead of VeLO(ft) and of all Adams",
        figure="C",
        check=below(L3RS, VELO, *ADAMS),
    ),
    Claim(
        source="3 D",
        text="the same order: L3RS is ahead of VeLO(ft) and of all Adams",
        figure="D",
        check=below(L3RS, VELO, *ADAMS),
    ),
    Claim(
        source="3 E",
        text="without pretraining L3RS does not beat the baselines",
        figure="E",
        check=negated(below(L3RS, "Adam")),
        reason=(
            "CNN-3 nearly learns 3 classes in 100 steps from any start; the paper's task is harder"
        ),
    ),
    Claim(
        source="3 F",
        text=(
            "L3RS needs half the steps of the best hand-designed optimizer, two thirds of "
            "VeLO(ft)'s"
        ),
        figure="F",
        check=every(faster(L3RS, 2, "SGD", *ADAMS), faster(L3RS, 1.5, VELO)),
    ),
    Claim(
        source="4, 5",
        text="L3RS begins with Adam and ends with SGD",
        figure="F",
        check=every(mostly(L3RS, "adam", 0, 0.1), mostly(L3RS, "sgd", 0.9, 1)),
        reason="ours begins with three quarters of SGD, and ends with half of each",
    ),
    Claim(
        source="4, 5",
        text="lambda warms up, stays, and decays at the end",
        figure="F",
        check=decays(L3RS),
        reason="ours has no warm-up: lambda falls from the first step on",
    ),
    Claim(
        source="6",
        text="meta-training makes L3RS good very soon, and improves it slowly from there",
        figure="",
        check=every(settles(L3RS, lambda share: share < 0.2), gains(L3RS)),
    ),
    Claim(
        source="6",
        text="the meta-training of VeLO(ft) is unstable, and converges late",
        figure="",
        check=every(steadier(L3RS, VELO), settles(VELO, lambda share: share > 0.5)),
    ),
    Claim(
        source="Table 2",
        text="both bases together are better than either alone",
        figure="ablations",
        check=ahead(UNCHANGED, "SGD alone", "Adam alone"),
        reason="each has one meta-training",
    ),
    Claim(
        source="Table 2",
        text="L3RS is better with an embedding than without",
        figure="ablations",
        check=ahead(UNCHANGED, "no embedding", "a network per layer", "one network for all"),
        reason="L3RS with no embedding at all ends lower still",
    ),
    Claim(
        source="Table 3",
        text="three averages are better than one average, raw features, or no features",
        figure="ablations",
        check=ahead(UNCHANGED, "one average", "raw features", "no features"),
        reason="all three end above it on average, but within the spread over 40 tasks",
    ),
    Claim(
        source="Table 4",
        text="a third base, Lion, makes it better still",
        figure="ablations",
        check=ahead("SGD, Adam, Lion", UNCHANGED),
        reason="the paper compares four sets; we do not know their order",
    ),
)

PAPER = Reproduction(
    title="L3RS, figures 3 to 6",
    figures=figures,
    seeds=10,
    seeds_full=25,
    out=Path("docs/results/l3rs"),
    trainings=trainings,
)

if __name__ == "__main__":
    main(PAPER, "experiments.l3rs")
