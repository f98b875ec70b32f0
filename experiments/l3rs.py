"""L3RS (2026): figures 3 to 6 and the ablations, on few-class tasks.

Claims: within the horizon L3RS is ahead of VeLO(ft) and of tuned Adam, and comparable to Adam
beyond it, where VeLO(ft) drops; other data or another pretraining change little; from a random
initialisation (E) L3RS does not beat the baselines. Its meta-training is good soon, that of
VeLO(ft) late. Its designs were chosen by ablations of base sets, embeddings and averages.

    make reproduce-l3rs       # or: python -m experiments.l3rs [--only A] [--full]

Against the paper: CNN-3 pretrained on half of the 20 classes of MNIST and FashionMNIST together
(or on scikit-learn's digits) where the paper has ResNets on ImageNet; 3-way tasks; 10 seeds. The
optimizers are those of the zoo, VeLO from scratch instead of from published weights; figure 6 has
two meta-trainings of each (``--only trainings``); the ablations are meta-trained here, for 400
generations each (``--full``: 1000), and run on 40 tasks.
"""

import dataclasses
from pathlib import Path

from experiments.checks import (
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
from experiments.panels import Claim
from experiments.reproduction import Figure, Reproduction, main
from experiments.zoo import ENTRIES
from metaopt.evaluation.comparing import slug
from metaopt.jobs.settings import TrainJob

LEARNED = {"L3RS": "l3rs-finetune-cnn", "VeLO(ft)": "velo-small"}
BASELINES = ("sgd", "adam", "adam-l3rs", "adam-l3rs-head")
# label -> settings of `TrainJob`; L3RS as it is has SGD and Adam, an embedding, three averages.
ABLATIONS = {
    "L3RS as it is": {},
    "SGD alone": {"base": "sgd"},
    "Adam alone": {"base": "adam"},
    "SGD, Adam, Lion": {"base": "sgd,adam,lion"},
    "no embedding": {"variant": "none"},
    "a network per layer": {"variant": "per_layer"},
    "one network for all": {"variant": "global"},
    "one average": {"ema": "one"},
    "raw features": {"ema": "raw"},
    "no features": {"ema": "none"},
}


def ablation(name: str, full: bool) -> TrainJob:
    """The zoo's meta-training with other settings."""
    (job,) = ENTRIES["l3rs-finetune-cnn"].jobs
    out = Path("runs/l3rs-ablations") / (slug(name) + "-full" * full)
    return dataclasses.replace(job, steps=1000 if full else 400, out=out, **ABLATIONS[name])


def figures(full: bool) -> list[Figure]:
    """The settings; `full` has longer meta-training of the ablations, the paper's K is ours."""
    panels = {
        "A": ("new classes", "finetune-A", 100),
        "A-10": ("new classes, 10 steps", "finetune-A", 10),
        "A-500": ("new classes, beyond the horizon", "finetune-A", 500),
        "B": ("other data", "finetune-B", 100),
        "C": ("other pretraining", "finetune-C", 100),
        "D": ("other data and pretraining", "finetune-D", 100),
        "E": ("no pretraining", "finetune-E", 100),
    }
    found = [
        Figure(
            *(name, f"Fig. 3 {name}: {title}", task, num_steps, 1, LEARNED),
            guards=("race",),
            fallbacks=("adam",),
            baselines=BASELINES,
        )
        for name, (title, task, num_steps) in panels.items()
    ]
    steps = Figure(
        *("F", "Fig. 3 F: steps to a loss; figs. 4, 5: dynamics", "finetune-A", 100, 1, LEARNED),
        guards=(),
        fallbacks=(),
        baselines=BASELINES,
        window=1,
    )
    ablations = Figure(
        *("ablations", "Tables 2 to 4: ablations", "finetune-A", 100, 1),
        {name: ablation(name, full) for name in ABLATIONS},
        guards=(),
        fallbacks=(),
        baselines=("adam",),
        seeds=40,
    )
    return [*found, steps, ablations]


OWN, VELO = LEARNED


def trainings(full: bool) -> dict[str, TrainJob]:
    """Figure 6: the zoo's meta-trainings, with several seeds."""
    found = {}
    for name, source in LEARNED.items():
        (job,) = ENTRIES[source].jobs
        for seed in range(5 if full else 2):
            out = Path(f"runs/l3rs-trainings/{slug(name)}-{seed}")
            found[f"{name}, seed {seed}"] = dataclasses.replace(job, seed=seed, out=out)
    return found


ADAMS = ("Adam", "Adam (L3RS's grid)", "Adam (head only)")
THERE = "L3RS as it is"
CLAIMS = (
    Claim("3 A", "within the horizon L3RS is ahead of VeLO(ft), 100 steps", "A", below(OWN, VELO)),
    Claim("3 A", "within the horizon L3RS is ahead of VeLO(ft), 10 steps", "A-10",
          below(OWN, VELO)),
    Claim("3 A", "within the horizon L3RS is ahead of all Adams, 100 steps", "A",
          below(OWN, *ADAMS)),
    Claim("3 A", "within the horizon L3RS is ahead of all Adams, 10 steps", "A-10",
          below(OWN, *ADAMS)),
    Claim("3 A", "beyond the horizon L3RS is comparable to Adam", "A-500",
          negated(below("Adam", OWN)), "no worse: it ends below"),
    Claim("3 A", "beyond the horizon VeLO(ft) drops", "A-500", rises(VELO)),
    *(
        Claim(f"3 {name}", "the same order", name, below(OWN, VELO, *ADAMS))
        for name in "BCD"
    ),
    Claim("3 E", "not pretrained, L3RS does not beat the baselines", "E",
          negated(below(OWN, "Adam")),
          "from any start, 100 steps nearly solve 3 classes with CNN-3: easier than the paper's"),
    Claim("3 F", "half the steps of the best hand-designed optimizer, two thirds of VeLO(ft)'s",
          "F", every(faster(OWN, 2, "SGD", *ADAMS), faster(OWN, 1.5, VELO))),
    Claim("4, 5", "begins on Adam, ends on SGD", "F",
          every(mostly(OWN, "adam", 0, 0.1), mostly(OWN, "sgd", 0.9, 1)),
          "ours begins on three quarters of SGD and ends on half of each"),
    Claim("4, 5", "lambda warms up, stays, and decays at the end", "F", decays(OWN),
          "ours has no warm-up: it falls from the first step on"),
    Claim("6", "L3RS is good very fast, and gains slowly from there", "",
          every(settles(OWN, lambda share: share < 0.2), gains(OWN))),
    Claim("6", "VeLO(ft) is unstable, and converges late", "",
          every(steadier(OWN, VELO), settles(VELO, lambda share: share > 0.5))),
    Claim("Table 2", "both bases are better than either", "ablations",
          ahead(THERE, "SGD alone", "Adam alone"), "one meta-training each"),
    Claim("Table 2", "with an embedding it is better than without", "ablations",
          ahead(THERE, "no embedding", "a network per layer", "one network for all"),
          "without any embedding it ends lower still"),
    Claim("Table 3", "three averages are better than one, none, or raw values", "ablations",
          ahead(THERE, "one average", "raw features", "no features"),
          "all are above it on average, none beyond the spread over 40 tasks"),
    Claim("Table 4", "a third base, Lion, is better still", "ablations",
          ahead("SGD, Adam, Lion", THERE), "the paper compares four sets; its order is not known"),
)  # fmt: skip

PAPER = Reproduction(
    "L3RS, figures 3 to 6", figures, (10, 25), Path("docs/results/l3rs"), trainings
)

if __name__ == "__main__":
    main(PAPER, "experiments.l3rs")
