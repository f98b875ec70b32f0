"""NES, PES, truncated ES and truncated back-propagation at equal inner steps, on digits.

Claim: what a meta-training method costs is inner steps; at equal numbers of them, which method is
ahead depends on the length K of the runs. All four train L3RS (SGD, Adam) on the digits MLP from
the same theta, and each theta is judged as a whole: the held-out loss after K steps, on eight runs
that are the same for all.

    python -m experiments.meta_methods

writes docs/results/meta/methods.json and docs/images/meta-methods.png; takes some minutes on one
core, about half of them for compilation. `--only PES` runs that method again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import meta, optimizers
from metaopt.core.types import LearnedOptimizer, TaskFamily, Theta
from metaopt.tasks import catalog

RESULT = Path("docs/results/meta/methods.json")
FIGURE = Path("docs/images/meta-methods.png")
JUDGED_RUNS, JUDGED_BATCHES = 8, 8
HIGHEST = 10.0  # what has diverged is drawn here


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison.

    Attributes:
      horizons: lengths K of runs; truncation: steps of a window (PES, ES, TBPTT).
      inner_steps: optimizee steps that each meta-training may take.
      populations: of NES, PES and ES, with one task each; runs: side by side in TBPTT.
      rates: learning rate of Adam on theta, per method (chosen once, not searched).
      sigma: noise of NES, PES and ES; clip: bound on the norm of TBPTT's gradient. Nothing
        decays in these short trainings.
      seeds: meta-trainings per method; judgements: points of a curve.
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


def trainers(
    config: Config, lopt: LearnedOptimizer, family: TaskFamily, theta: Theta, horizon: int
) -> Iterator[tuple[str, float, meta.MetaTrainer]]:
    """Name, learning rate and method of everything that is compared at a horizon."""
    es: dict[str, Any] = {"tasks": 1, "sigma": config.sigma, "half_life": 0}
    windows: dict[str, Any] = {"rollout": horizon, "truncation": config.truncation}
    for name, lr in config.rates.items():
        if name in config.populations:
            es["population"] = config.populations[name]
        if name == "NES":
            settings = meta.NESConfig(min_steps=horizon, max_steps=horizon, lr=lr, **es)
            trainer = meta.nes(lopt, family, theta, settings)
        elif name == "TBPTT":
            settings = meta.TBPTTConfig(tasks=config.runs, lr=lr, clip=config.clip, **windows)
            trainer = meta.tbptt(lopt, family, settings)
        else:
            settings = meta.PESConfig(persistent=name == "PES", lr=lr, **es, **windows)
            trainer = meta.pes(lopt, family, theta, settings)
        yield name, lr, trainer


def differentiable_adam() -> optimizers.Base:
    """Adam with a meta-gradient at pixels that are always 0 (optax: `eps_root`), else the same."""
    hyper = {"logit_b1": float(np.log(9.0)), "logit_b2": float(np.log(999.0))}  # 0.9, 0.999

    def make(h):
        b1, b2 = jax.nn.sigmoid(h["logit_b1"]), jax.nn.sigmoid(h["logit_b2"])
        return optax.adam(1.0, b1, b2, eps_root=1e-30)

    return optimizers.Base("adam", hyper, make)


def judge(lopt: LearnedOptimizer, family: TaskFamily, horizon: int) -> Callable[[Theta], Any]:
    runs = meta.starts(family, jax.random.split(jax.random.key(1_000), JUDGED_RUNS))

    @jax.jit
    def loss(theta):
        one = lambda start: meta.inner_run(
            lopt, family, theta, start, num_steps=horizon, eval_batches=JUDGED_BATCHES
        )
        return jnp.mean(jax.vmap(one)(runs)[0])

    return loss


def curve(
    config: Config, trainer: meta.MetaTrainer, step, loss, theta: Theta, seed: int
) -> dict[str, Any]:
    """One meta-training: inner steps taken, and the loss of theta there."""
    k_init, k_steps = jax.random.split(jax.random.key(seed))
    state, taken, update = trainer.init(k_init, theta), 0, 0
    steps, non_finite = [0], 0
    losses: list[float | None] = [float(loss(theta))]
    marks = list(np.linspace(0, config.inner_steps, config.judgements + 1)[1:])
    while marks:
        state, metrics = step(jax.random.fold_in(k_steps, update), state)
        taken, update = taken + int(metrics["inner_steps"]), update + 1
        non_finite += int(metrics["non_finite"])
        if taken >= marks[0]:
            marks.pop(0)
            steps.append(taken)
            judged = float(loss(trainer.theta(state)))
            losses.append(judged if np.isfinite(judged) else None)  # JSON knows no infinity
    return {"steps": steps, "loss": losses, "updates": update, "non_finite": non_finite}


def run(config: Config, only: Sequence[str]) -> list[dict[str, Any]]:
    family = catalog.family("digits")
    lopt = optimizers.l3rs(("sgd", differentiable_adam()))
    params = family.task(family.sample(jax.random.key(0))).init(jax.random.key(0))
    theta = lopt.init(jax.random.key(0), params)
    entries = []
    for horizon in config.horizons:
        loss = judge(lopt, family, horizon)
        for name, lr, trainer in trainers(config, lopt, family, theta, horizon):
            if name not in only:
                continue
            started, step = time.perf_counter(), jax.jit(trainer.step)
            curves = [curve(config, trainer, step, loss, theta, s) for s in range(config.seeds)]
            entry = {"method": name, "horizon": horizon, "lr": lr, "curves": curves}
            entry["seconds"] = round(time.perf_counter() - started, 1)
            entries.append(entry)
            ends = [c["loss"][-1] for c in curves]
            print(f"K {horizon} {name} lr {lr:g}: {ends} ({entry['seconds']} s)", flush=True)
    return entries


def draw(record: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt

    from experiments.pictures import save
    from metaopt.report.plots import COLOURS, style

    horizons = record["config"]["horizons"]
    with plt.rc_context(style()):
        figure, axes = plt.subplots(
            1, len(horizons), figsize=(5.0 * len(horizons), 3.6), layout="constrained"
        )
        for axis, horizon in zip(np.atleast_1d(axes), horizons, strict=True):
            entries = [e for e in record["entries"] if e["horizon"] == horizon]
            for colour, entry in zip(COLOURS, entries, strict=False):
                losses = np.array([c["loss"] for c in entry["curves"]], np.float64)
                losses = np.minimum(np.nan_to_num(losses, nan=np.inf), HIGHEST)
                steps = np.array(entry["curves"][0]["steps"])
                axis.plot(
                    steps, losses.mean(axis=0), "o-", ms=3, color=colour, label=entry["method"]
                )
                axis.fill_between(
                    steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.12, lw=0
                )
            axis.set(
                title=f"runs of {horizon} steps",
                xlabel="inner steps of meta-training",
                yscale="log",
            )
            axis.set_ylabel(f"held-out loss after {horizon} steps")
            axis.legend()
        save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="only draw the record again")
    parser.add_argument("--only", nargs="*", default=list(CONFIG.rates), help="methods to run")
    args = parser.parse_args()
    if not args.draw:
        new = run(CONFIG, args.only)
        old = json.loads(RESULT.read_text())["entries"] if RESULT.exists() else []
        kept = [entry for entry in old if entry["method"] not in args.only]
        entries = sorted(kept + new, key=lambda e: (e["horizon"], e["method"]))
        record = {"config": dataclasses.asdict(CONFIG), "entries": entries}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    draw(json.loads(RESULT.read_text()), FIGURE)


if __name__ == "__main__":
    main()
