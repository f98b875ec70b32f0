"""Draws what each learned optimizer does in a training run: the figures of docs/optimizers.

Claim: on the task of its meta-training (digits, 100 steps), L3RS and VeLO end below tuned Adam; the
LSTM starts slowly and ends where tuned Adam does. The other axes show how they step.

    python -m experiments.optimizer_figures [lstm l3rs velo] [--draw]

Needs no data. Meta-trains the three in runs/figures (some minutes on 2 cores; it resumes) and
records runs of each optimizer. Writes docs/results/optimizers/NAME.json and
docs/images/NAME-run.png. ``--draw`` only draws the committed records again.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import metaopt
from experiments.pictures import save
from metaopt import meta, optimizers
from metaopt.core.rollouts import step, unroll
from metaopt.core.trees import leaf_names
from metaopt.core.types import Task, single
from metaopt.datasets import digits
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta import NESConfig, TBPTTConfig
from metaopt.meta.loop import train
from metaopt.report.figures import style
from metaopt.report.looks import COLOURS
from metaopt.tasks import classification
from metaopt.tasks.networks import MLP

RUNS = Path("runs/figures")
RECORDS = Path("docs/results/optimizers")
IMAGES = Path("docs/images")
TITLES = {"lstm": "LSTM", "l3rs": "L3RS", "velo": "VeLO (32/16)"}

TRAININGS = {
    "lstm": TrainJob(
        task="digits",
        learned=optimizers.LSTM(p=7.0),
        method=TBPTTConfig(
            tasks=2, objective="log", average=0.98, lr=3e-3, half_life=150, clip=1.0
        ),
        steps=240,
        validate_every=40,
        out=RUNS / "lstm",
    ),
    "l3rs": TrainJob(
        task="digits",
        learned=optimizers.L3RS(),
        method=NESConfig(population=32, tasks=4, sigma=0.05, lr=1e-2, half_life=200),
        steps=150,
        out=RUNS / "l3rs",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the runs, of the baselines, and of VeLO's meta-training.

    Attributes:
      num_steps: steps of a run.
      seeds: runs of each optimizer.
      tuning_seeds: runs per rate of a baseline.
      sgd: rates that SGD is tuned over.
      adam: rates that Adam is tuned over.
      velo: hidden units and bank of VeLO.
      nes: settings of its meta-training.
      updates: meta-updates of its meta-training.
    """

    num_steps: int = 100
    seeds: int = 8
    tuning_seeds: int = 4
    sgd: tuple[float, ...] = (0.03, 0.1, 0.3, 0.6, 1.0, 3.0)
    adam: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    velo: tuple[int, int] = (32, 16)
    nes: NESConfig = field(
        default_factory=lambda: NESConfig(
            population=16, tasks=2, sigma=0.02, lr=1e-2, half_life=300
        )
    )
    updates: int = 300


CONFIG = Config()


def make_task() -> Task:
    """The task of the meta-training: MLP 64-32-10, batch 64."""
    return classification(MLP((32, 10)), digits(), batch_size=64)


def meta_trained(name: str, task: Task) -> optax.GradientTransformation:
    """A learned optimizer for runs of `CONFIG.num_steps` steps."""
    if name in TRAININGS:
        job = TRAININGS[name]
        meta_train(job)
        return metaopt.load(job.out).apply(num_steps=CONFIG.num_steps)
    lopt, family = optimizers.velo(*CONFIG.velo), single(task)
    theta = lopt.init(jax.random.key(0), task.init(jax.random.key(1)))

    theta, _ = train(
        meta.nes(lopt, family, CONFIG.nes),
        theta,
        steps=CONFIG.updates,
        seed=0,
        out=RUNS / name,
        config=dataclasses.asdict(CONFIG.nes),
        validate=meta.validation(lopt, family, CONFIG.num_steps),
    )
    return lopt.apply(theta, num_steps=CONFIG.num_steps)


def trace(tx: optax.GradientTransformation, task: Task, key: jax.Array) -> dict[str, jax.Array]:
    """One run, step by step, with L layers.

    Returns:
      "loss" ``[T]``: test loss after each step; "norm" ``[T, L]``: norm of the step of a layer;
      "cosine" ``[T, L]``: between the step of a layer and its descent direction; of L3RS also
      "lambda" and "alpha".
    """
    k_init, k_data = jax.random.split(key)
    params, test = task.init(k_init), task.whole("test")

    def body(carry, batch):
        params, state = carry
        new, state, (_, grad) = step(tx, params, state, lambda p: task.loss(p, batch))
        steps, grads = jax.tree.leaves(optax.tree.sub(new, params)), jax.tree.leaves(grad)
        step_norms, grad_norms = layer_norms(steps), layer_norms(grads)
        inner = jnp.stack([jnp.vdot(s, -g) for s, g in zip(steps, grads, strict=True)])
        measurements = {
            "loss": task.loss(new, test),
            "norm": step_norms,
            "cosine": inner / jnp.maximum(step_norms * grad_norms, 1e-12),
        }
        if isinstance(state, optimizers.L3RSState):
            measurements |= {"lambda": state.lambda_, "alpha": state.alpha}
        return (new, state), measurements

    def layer_norms(leaves):
        return jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in leaves])

    batches = task.sample(k_data, (CONFIG.num_steps,))
    _, measurements = jax.lax.scan(body, (params, tx.init(params)), batches)
    return measurements


def tune(make: Callable[[Any], Any], rates: tuple[float, ...], task: Task) -> float:
    """The rate with the lowest mean loss on the "valid" split after the last step."""
    valid = task.whole("valid")

    def last_loss(rate, key):
        k_init, k_data = jax.random.split(key)
        params, tx = task.init(k_init), make(rate)
        batches = task.sample(k_data, (CONFIG.num_steps,))
        params, _, _ = unroll(tx, params, tx.init(params), task.loss, batches)
        return task.loss(params, valid)

    keys = jax.random.split(jax.random.key(3), CONFIG.tuning_seeds)
    over_seeds = jax.vmap(last_loss, in_axes=(None, 0))
    losses = jax.jit(jax.vmap(over_seeds, in_axes=(0, None)))(jnp.array(rates), keys)
    return rates[int(jnp.argmin(jnp.mean(losses, axis=1)))]


def record(name: str) -> Path:
    """Runs one optimizer and the tuned baselines, and writes the record: means over the seeds."""
    task = make_task()
    rates = {
        "SGD": tune(optax.sgd, CONFIG.sgd, task),
        "Adam": tune(optax.adam, CONFIG.adam, task),
    }
    runs: dict[str, Any] = {
        name: meta_trained(name, task),
        "SGD": optax.sgd(rates["SGD"]),
        "Adam": optax.adam(rates["Adam"]),
    }
    keys = jax.random.split(jax.random.key(4), CONFIG.seeds)
    traces = {}
    for label, tx in runs.items():
        traces_of_seeds = jax.jit(jax.vmap(lambda key, tx=tx: trace(tx, task, key)))
        traces[label] = jax.tree.map(np.asarray, traces_of_seeds(keys))
    result = {
        "optimizer": name,
        "layers": leaf_names(task.init(keys[0])),
        "rates": rates,
        "loss": {
            label: {
                "mean": rounded(measurements["loss"].mean(axis=0)),
                "low": rounded(measurements["loss"].min(axis=0)),
                "high": rounded(measurements["loss"].max(axis=0)),
            }
            for label, measurements in traces.items()
        },
    }
    for key, values in traces[name].items():
        if key != "loss":
            result[key] = rounded(values.mean(axis=0))
    path = RECORDS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    return path


def rounded(x: np.ndarray) -> Any:
    """An array as nested lists of numbers with four digits."""
    return np.vectorize(lambda value: float(f"{value:.4g}"))(x).tolist()


def draw(path: Path, out: Path) -> None:
    """Draws a record.

    Left: the loss beside those of the tuned baselines. Middle: the norm of the step, per layer.
    Right: the weight of Adam (L3RS), or the cosine of step and descent direction.
    """
    result = json.loads(path.read_text())
    name = result["optimizer"]
    title, rates = TITLES[name], result["rates"]
    colours = {name: COLOURS[2], "SGD": COLOURS[0], "Adam": COLOURS[1]}
    labels = {name: title, **{label: f"{label}, rate {rate:g}" for label, rate in rates.items()}}
    norms = np.array(result["norm"])
    if "alpha" in result:
        right, right_title = np.array(result["alpha"])[..., 1], "weight of Adam (the rest: SGD)"
    else:
        right, right_title = np.array(result["cosine"]), "cosine of step and descent direction"
    steps = np.arange(1, len(norms) + 1)
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, 3, figsize=(11.4, 3.3), layout="constrained")
        for label, loss in result["loss"].items():
            colour = colours[label]
            axes[0].plot(steps, loss["mean"], color=colour, label=labels[label])
            axes[0].fill_between(steps, loss["low"], loss["high"], color=colour, alpha=0.13, lw=0)
        for index, layer in enumerate(result["layers"]):
            colour = COLOURS[2 + index]
            axes[1].plot(steps, norms[:, index], label=layer, color=colour, lw=1.4)
            axes[2].plot(steps, right[:, index], color=colour, lw=1.4)
        axes[0].set(yscale="log", title="test loss", xlabel="step")
        axes[1].set(yscale="log", title=f"{title}: norm of the step, per layer", xlabel="step")
        axes[2].set(title=right_title, xlabel="step")
        axes[0].legend(fontsize=8)
        handles, names = axes[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower right", ncols=4, fontsize=8)
        save(figure, out)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/optimizers.")
    parser.add_argument("names", nargs="*", default=list(TITLES), help="optimizers; none: all")
    parser.add_argument("--draw", action="store_true", help="only draw the committed records again")
    args = parser.parse_args()
    for name in args.names:
        path = RECORDS / f"{name}.json" if args.draw else record(name)
        draw(path, IMAGES / f"{name}-run.png")


if __name__ == "__main__":
    main()
