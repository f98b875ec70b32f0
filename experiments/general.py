"""Optimizers for networks of any kind, meta-trained on small tasks, and their evaluation.

    python -m experiments.general l3rs                  # L3RS of Adam and Muon, a search
    python -m experiments.general celo2 --minutes 30    # the form of Celo2, 347 numbers
    python -m experiments.general evaluate              # both, beside others, on the suite general

Meta-training needs no data files. The suite needs MNIST, FashionMNIST and CIFAR-10 (docs/data.md),
and takes some hours on 2 cores. Every part resumes. Writes to runs/general.

L3RS is searched among those that take the steps of one of its bases. The learning rate falls with
the horizon and with the size of a layer. Runs of 30, 173 and 1000 steps are scored by the mean
logarithm of held-out losses after each quarter, and all tasks and lengths weigh alike. Celo2's form
begins as Muon, and natural evolution strategies go on from there. None of the tasks of the suite is
trained on.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from metaopt import meta
from metaopt.jobs.evaluate import EvaluateJob, evaluate_suite
from metaopt.jobs.specialise import SpecialiseJob, search_and_train
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta import NESConfig, devices
from metaopt.optimizers import Celo2, imitate_muon
from metaopt.report import print_summary, report
from metaopt.tasks import catalog
from metaopt.zoo import exports

OUT = Path("runs/general")
TASKS = ("digits", "digits-deep", "digits-small-batch", "digits-cnn", "spirals")
# Other structures, on which lower learning rates are best.
STRUCTURES = ("digits-vit", "digits-autoencoder")
SHORTEST, LONGEST = 30, 1000  # steps of a run
# Candidates of the search for the rates of Celo2's form.
RATES = (1e-3, 3e-3, 1e-2)
ADAM_FACTORS = (1.0, 3.0, 10.0)
RUNS = 4  # of each task, that a point of the search is judged on


# The zoo's l3rs-general.
L3RS_JOB = SpecialiseJob(
    task=",".join((*TASKS, *STRUCTURES)),
    bases="adam,muon",
    any_network=True,
    num_steps=LONGEST,
    min_steps=SHORTEST,
    points=64,
    minutes=0.0,
    out=OUT / "l3rs",
)


def l3rs() -> Path:
    """Searches an L3RS for any network; returns the folder of the export."""
    return _exported("l3rs-general", search_and_train(L3RS_JOB))


def celo2(minutes: float) -> Path:
    """Searches and meta-trains an optimizer of Celo2's form; returns the folder of the export."""
    devices.initialise()
    start = OUT / "celo2" / "searched"
    if not (start / exports.SPEC).exists():
        _search_celo2(start)
    job = TrainJob(
        task=",".join(TASKS),
        learned=exports.load(start).settings,
        method=NESConfig(
            population=16,
            tasks=2,
            sigma=0.02,
            lr=3e-3,
            min_steps=SHORTEST,
            max_steps=LONGEST,
            lengths="log_uniform",
            objective="anytime",
        ),
        minutes=minutes,
        validate_on="anytime",
        validate_at="all",
        warm_start=str(start),
        out=OUT / "celo2" / "trained",
    )
    return _exported("celo2-own", meta_train(job))


def _exported(name: str, folder: Path) -> Path:
    """A copy of the export in `folder` in a folder of its name in tables."""
    export = exports.load(folder)
    return exports.save(OUT / name, export.settings, export.theta, export.trained)


def _search_celo2(folder: Path) -> None:
    """Exports Muon's direction, at the best of some learning rates for matrices and for the rest.

    Args:
      folder: of the export.
    """
    started = time.perf_counter()
    families = [catalog.family(name) for name in TASKS]
    mesh = NESConfig().mesh()
    theta = imitate_muon(Celo2().build().init(jax.random.key(0), {"w": jnp.zeros((2, 2))}))
    scores: dict[Celo2, float] = {}
    for lr, adam_factor in itertools.product(RATES, ADAM_FACTORS):
        settings = Celo2(lr=lr, adam_factor=adam_factor, schedule="cosine", warn_frozen=False)
        validate: Any = meta.validation(
            settings.build(), families, LONGEST, on="anytime", runs=RUNS, mesh=mesh
        )
        scores[settings] = float(jax.jit(validate)(theta, jax.random.key(1)))
        print(f"lr {lr:g}, Adam's {adam_factor:g} times that: {scores[settings]:.3f}", flush=True)
    best = min(scores, key=lambda settings: scores[settings])
    inner_steps = float(len(scores) * len(families) * RUNS * LONGEST)
    cost = {"inner_steps": inner_steps, "seconds": time.perf_counter() - started}
    exports.save(folder, best, theta, {"cost": cost})


def evaluation(workers: int) -> EvaluateJob:
    """The evaluation of both, of the published optimizers, and of tuned baselines."""
    return EvaluateJob(
        checkpoints=(
            Path("celo"),
            Path("celo-adam"),
            OUT / "l3rs-general",
            OUT / "celo2-own",
        ),
        suite="general",
        workers=workers,
        out=OUT / "evaluation",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("l3rs", "celo2", "evaluate"))
    parser.add_argument("--minutes", type=float, default=25.0, help="of Celo2's meta-training")
    parser.add_argument("--workers", type=int, default=2, help="processes of the evaluation")
    args = parser.parse_args(argv)
    if args.part == "evaluate":
        print_summary(report(evaluate_suite(evaluation(args.workers))))
    else:
        print(l3rs() if args.part == "l3rs" else celo2(args.minutes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
