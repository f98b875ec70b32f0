"""Compares NES, PES, truncated ES and truncated back-propagation at equal inner steps, on digits.

Claim: the cost of a meta-training method is its inner steps, and at equal numbers of them the
length K of the runs decides which method is ahead. All four meta-train L3RS (SGD, Adam) on the
digits MLP from the same theta. Each theta is judged on whole runs: the held-out loss after K steps,
averaged over eight runs that are the same for all.

    python -m experiments.meta_methods [--only PES] [--draw]

Needs no data. Takes 13 minutes on one core, about half of them for compilation. Writes
docs/results/meta/methods.json and docs/images/meta-methods.png; docs/meta-training.md shows them.
``--only`` runs some methods again, ``--draw`` only draws the record again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from experiments.pictures import save
from metaopt import meta, optimizers
from metaopt.core.types import LearnedOptimizer, TaskFamily, Theta
from metaopt.evaluation.records import write_json
from metaopt.report.figures import style
from metaopt.report.looks import COLOURS
from metaopt.tasks import catalog

RESULT = Path("docs/results/meta/methods.json")
FIGURE = Path("docs/images/meta-methods.png")
JUDGED_RUNS = 8
JUDGED_BATCHES = 8
HIGHEST = 10.0  # losses above it, and diverged runs, are drawn here

Judge = Callable[[Theta], jax.Array]
"""``theta -> loss``: the mean held-out loss of whole runs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison. Learning rates and sigma do not decay in these short trainings.

    Attributes:
      horizons: lengths K of runs.
      truncation: steps of a window (PES, truncated ES, TBPTT).
      inner_steps: optimizee steps that each meta-training may take.
      populations: candidates of NES, PES and truncated ES, on one task each.
      runs: runs side by side of TBPTT.
      rates: learning rate of Adam on theta, per method (chosen once, not searched).
      sigma: noise on theta (NES, PES, truncated ES).
      clip: bound on the norm of the gradient (TBPTT).
      seeds: meta-trainings per method.
      judgements: points of a curve.
    """

    horizons: tuple[int, ...] = (100, 500)
    truncation: int = 20
    inner_steps: int = 120_000
    populations: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"NES": 8, "PES": 32, "truncated ES": 8}
    )
    runs: int = 8
    rates: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"NES": 2e-2, "PES": 5e-3, "truncated ES": 3e-3, "TBPTT": 1e-3}
    )
    sigma: float = 0.05
    clip: float = 1.0
    seeds: int = 2
    judgements: int = 6


CONFIG = Config()


def meta_trainer(
    config: Config,
    method: str,
    *,
    lopt: LearnedOptimizer,
    family: TaskFamily,
    horizon: int,
) -> meta.MetaTrainer:
    """The meta-trainer of a method for runs of `horizon` steps."""
    if method == "NES":
        settings = meta.NESConfig(
            population=config.populations[method],
            tasks=1,
            sigma=config.sigma,
            lr=config.rates[method],
            half_life=0,
            min_steps=horizon,
            max_steps=horizon,
        )
        return meta.nes(lopt, family, settings)
    if method == "TBPTT":
        settings = meta.TBPTTConfig(
            tasks=config.runs,
            lr=config.rates[method],
            clip=config.clip,
            rollout=horizon,
            truncation=config.truncation,
        )
        return meta.tbptt(lopt, family, settings)
    settings = meta.PESConfig(
        persistent=method == "PES",
        population=config.populations[method],
        tasks=1,
        sigma=config.sigma,
        lr=config.rates[method],
        half_life=0,
        rollout=horizon,
        truncation=config.truncation,
    )
    return meta.pes(lopt, family, settings)


def differentiable_adam() -> optimizers.Base:
    """Adam whose meta-gradient is finite at pixels that are always 0 (optax: `eps_root`)."""
    hyper = {"logit_b1": float(np.log(9.0)), "logit_b2": float(np.log(999.0))}  # 0.9, 0.999

    def make(h):
        b1, b2 = jax.nn.sigmoid(h["logit_b1"]), jax.nn.sigmoid(h["logit_b2"])
        return optax.adam(1.0, b1, b2, eps_root=1e-30)

    return optimizers.Base("adam", hyper, make)


def judge_for(lopt: LearnedOptimizer, family: TaskFamily, horizon: int) -> Judge:
    """The judge of runs of `horizon` steps."""
    starts = meta.starts(family, jax.random.split(jax.random.key(1_000), JUDGED_RUNS))

    @jax.jit
    def judge(theta):
        def one_run(start):
            return meta.inner_run(
                lopt, family, theta, start, num_steps=horizon, eval_batches=JUDGED_BATCHES
            )

        losses, *_ = jax.vmap(one_run)(starts)
        return jnp.mean(losses)

    return judge


def curve(
    config: Config,
    trainer: meta.MetaTrainer,
    step: Callable[..., Any],
    *,
    judge: Judge,
    theta: Theta,
    seed: int,
) -> dict[str, Any]:
    """One meta-training.

    Args:
      config: the settings.
      trainer: the meta-trainer.
      step: its compiled `step`.
      judge: judges theta at equal numbers of inner steps.
      theta: where the meta-training starts.
      seed: fixes its randomness.

    Returns:
      ``{"steps", "loss", "updates", "non_finite"}``: inner steps at each judgement, the loss of
      theta there (None: not finite), meta-updates, and meta-updates that were not finite.
    """
    k_init, k_steps = jax.random.split(jax.random.key(seed))
    state = trainer.init(k_init, theta)
    inner_steps = updates = non_finite = 0
    steps = [0]
    losses: list[float | None] = [float(judge(theta))]
    marks = np.linspace(0, config.inner_steps, config.judgements + 1)[1:].tolist()
    while marks:
        state, metrics = step(jax.random.fold_in(k_steps, updates), state)
        inner_steps += int(metrics["inner_steps"])
        updates += 1
        non_finite += int(metrics["non_finite"])
        if inner_steps >= marks[0]:
            marks.pop(0)
            loss = float(judge(trainer.theta(state)))
            steps.append(inner_steps)
            losses.append(loss if np.isfinite(loss) else None)  # JSON has no infinity
    return {"steps": steps, "loss": losses, "updates": updates, "non_finite": non_finite}


def run(config: Config, only: Sequence[str]) -> list[dict[str, Any]]:
    """Meta-trains by the methods in `only` and returns their entries of the record."""
    family = catalog.family("digits")
    lopt = optimizers.l3rs(("sgd", differentiable_adam()))
    params = family.task(family.sample(jax.random.key(0))).init(jax.random.key(0))
    theta = lopt.init(jax.random.key(0), params)
    entries = []
    for horizon in config.horizons:
        judge = judge_for(lopt, family, horizon)
        for method, lr in config.rates.items():
            if method not in only:
                continue
            trainer = meta_trainer(config, method, lopt=lopt, family=family, horizon=horizon)
            start = time.perf_counter()
            step = jax.jit(trainer.step)
            curves = [
                curve(config, trainer, step, judge=judge, theta=theta, seed=seed)
                for seed in range(config.seeds)
            ]
            seconds = round(time.perf_counter() - start, 1)
            entries.append(
                {
                    "method": method,
                    "horizon": horizon,
                    "lr": lr,
                    "curves": curves,
                    "seconds": seconds,
                }
            )
            last = [curve["loss"][-1] for curve in curves]
            print(f"K {horizon} {method} lr {lr:g}: {last} ({seconds} s)", flush=True)
    return entries


def draw(record: dict[str, Any], out: Path) -> None:
    """Draws the means of the seeds and their range, one axis per horizon."""
    horizons = record["config"]["horizons"]
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, len(horizons), figsize=(5.0 * len(horizons), 3.6), layout="constrained"
        )
        for axis, horizon in zip(np.atleast_1d(axes), horizons, strict=True):
            entries = [entry for entry in record["entries"] if entry["horizon"] == horizon]
            for colour, entry in zip(COLOURS, entries, strict=False):
                losses = np.array([curve["loss"] for curve in entry["curves"]], np.float64)
                losses = np.minimum(np.nan_to_num(losses, nan=np.inf), HIGHEST)
                mean, low, high = losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)
                steps = np.array(entry["curves"][0]["steps"])
                axis.plot(steps, mean, "o-", ms=3, color=colour, label=entry["method"])
                axis.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
            axis.set(
                title=f"runs of {horizon} steps",
                xlabel="inner steps of meta-training",
                ylabel=f"held-out loss after {horizon} steps",
                yscale="log",
            )
            axis.legend()
        save(figure, out)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="only draw the record again")
    parser.add_argument("--only", nargs="*", default=list(CONFIG.rates), help="methods to run")
    args = parser.parse_args()
    if not args.draw:
        entries = run(CONFIG, args.only)
        if RESULT.exists():
            recorded = json.loads(RESULT.read_text())["entries"]
            entries += [entry for entry in recorded if entry["method"] not in args.only]
        entries.sort(key=lambda entry: (entry["horizon"], entry["method"]))
        write_json(RESULT, {"config": dataclasses.asdict(CONFIG), "entries": entries})
    draw(json.loads(RESULT.read_text()), FIGURE)


if __name__ == "__main__":
    main()
