"""What each learned optimizer does in a training run: the figures of docs/optimizers.

Claim: on the task of meta-training (digits, 100 steps) L3RS and VeLO end below tuned Adam; the LSTM
starts slowly, and ends where tuned Adam does. How they step: the panels show it.

    python -m experiments.optimizer_figures [lstm l3rs velo] [--draw]

takes the LSTM and L3RS of `make run`, meta-trains a small VeLO (a few minutes; interrupted, it goes
on), records runs of each in docs/results/optimizers/NAME.json, and draws docs/images/NAME-run.png.
``--draw`` draws the committed records again.
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
import numpy as np
import optax

import metaopt
from metaopt import meta, optimizers
from metaopt.core.rollouts import step, unroll
from metaopt.core.trees import leaf_names
from metaopt.core.types import Task, single
from metaopt.datasets import digits
from metaopt.meta import NESConfig
from metaopt.meta.loop import train
from metaopt.tasks import classification
from metaopt.tasks.networks import MLP

RUNS, RECORDS, IMAGES = (
    Path("runs/figures"),
    Path("docs/results/optimizers"),
    Path("docs/images"),
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs, the rates that the baselines are tuned over, and where theta comes from.

    Attributes:
      exports: optimizers of the main job (`make run`) and their folders.
      velo: hidden units and bank of the VeLO that is meta-trained here, by `nes` in `updates`.
    """

    num_steps: int = 100
    seeds: int = 8
    tuning_seeds: int = 4
    sgd: tuple[float, ...] = (0.03, 0.1, 0.3, 0.6, 1.0, 3.0)
    adam: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    exports: dict[str, Path] = field(
        default_factory=lambda: {"lstm": Path("runs/digits/L2O"), "l3rs": Path("runs/digits/L3RS")}
    )
    velo: tuple[int, int] = (32, 16)
    nes: NESConfig = field(
        default_factory=lambda: NESConfig(
            population=16, tasks=2, sigma=0.02, lr=1e-2, half_life=300
        )
    )
    updates: int = 300


CONFIG = Setting()


def make_task() -> Task:
    """The digits task of the main job: MLP 64-32-10, batch 64."""
    return classification(MLP((32, 10)), digits(), batch_size=64)


def trained(name: str, task: Task) -> optax.GradientTransformation:
    """The transformation for runs of `CONFIG.num_steps`; VeLO's training resumes."""
    if name in CONFIG.exports:
        return metaopt.load(CONFIG.exports[name]).apply(num_steps=CONFIG.num_steps)
    lopt, family = optimizers.velo(*CONFIG.velo), single(task)
    theta = lopt.init(jax.random.key(0), task.init(jax.random.key(1)))

    theta, _ = train(
        meta.nes(lopt, family, theta, CONFIG.nes),
        theta,
        steps=CONFIG.updates,
        seed=0,
        out=RUNS / name,
        config=dataclasses.asdict(CONFIG.nes),
        validate=meta.validation(lopt, family, CONFIG.num_steps),
    )
    return lopt.apply(theta, num_steps=CONFIG.num_steps)


def trace(tx: optax.GradientTransformation, task: Task, key: jax.Array) -> dict[str, jax.Array]:
    """One run, step by step: test loss, and per layer the step's norm and its direction.

    Returns: "loss" ``[T]`` after each step; "norm" ``[T, L]``; "cosine" ``[T, L]`` between the
      step and the descent direction; "lambda" and "alpha" for L3RS.
    """
    k_init, k_data = jax.random.split(key)
    params, test = task.init(k_init), task.whole("test")

    def body(carry, batch):
        params, state = carry
        new, state, (_, grad) = step(tx, params, state, lambda p: task.loss(p, batch))
        steps, grads = (jax.tree.leaves(t) for t in (optax.tree.sub(new, params), grad))
        norm, gradient = (
            jnp.stack([jnp.linalg.norm(x.ravel()) for x in leaves]) for leaves in (steps, grads)
        )
        inner = jnp.stack([jnp.vdot(s, -g) for s, g in zip(steps, grads, strict=True)])
        seen = {
            "loss": task.loss(new, test),
            "norm": norm,
            "cosine": inner / jnp.maximum(norm * gradient, 1e-12),
        }
        if isinstance(state, optimizers.L3RSState):
            seen |= {"lambda": state.lambda_, "alpha": state.alpha}
        return (new, state), seen

    batches = task.sample(k_data, (CONFIG.num_steps,))
    return jax.lax.scan(body, (params, tx.init(params)), batches)[1]


def tuned(make: Callable[[Any], Any], rates: tuple[float, ...], task: Task) -> float:
    """The rate with the lowest mean final loss on the "valid" split."""
    valid = task.whole("valid")

    def final(rate, key):
        k_init, k_data = jax.random.split(key)
        params, tx = task.init(k_init), make(rate)
        batches = task.sample(k_data, (CONFIG.num_steps,))
        return task.loss(unroll(tx, params, tx.init(params), task.loss, batches)[0], valid)

    keys = jax.random.split(jax.random.key(3), CONFIG.tuning_seeds)
    losses = jax.jit(jax.vmap(jax.vmap(final, (None, 0)), (0, None)))(jnp.array(rates), keys)
    return rates[int(jnp.argmin(jnp.mean(losses, axis=1)))]


def record(name: str) -> Path:
    """Runs and writes the record of one optimizer: means over the seeds."""
    task = make_task()
    rates = {
        "SGD": tuned(optax.sgd, CONFIG.sgd, task),
        "Adam": tuned(optax.adam, CONFIG.adam, task),
    }
    runs: dict[str, Any] = {
        name: trained(name, task),
        "SGD": optax.sgd(rates["SGD"]),
        "Adam": optax.adam(rates["Adam"]),
    }
    keys = jax.random.split(jax.random.key(4), CONFIG.seeds)
    traces = {
        label: jax.tree.map(
            np.asarray, jax.jit(jax.vmap(lambda k, tx=tx: trace(tx, task, k)))(keys)
        )
        for label, tx in runs.items()
    }
    rounded = lambda x: np.vectorize(lambda v: float(f"{v:.4g}"))(x).tolist()
    result = {
        "optimizer": name,
        "layers": leaf_names(task.init(keys[0])),
        "rates": rates,
        "loss": {
            label: {
                key: rounded(f(seen["loss"], axis=0))
                for key, f in {"mean": np.mean, "low": np.min, "high": np.max}.items()
            }
            for label, seen in traces.items()
        },
        **{key: rounded(np.mean(v, axis=0)) for key, v in traces[name].items() if key != "loss"},
    }
    path = RECORDS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    return path


def draw(path: Path, out: Path) -> None:
    """Loss next to the tuned baselines; step norm per layer; mixture (L3RS) or direction."""
    import matplotlib.pyplot as plt

    from experiments.pictures import save
    from metaopt.report.plots import COLOURS, style

    seen = json.loads(path.read_text())
    title = {"lstm": "LSTM", "l3rs": "L3RS", "velo": "VeLO (32/16)"}[seen["optimizer"]]
    colours = {seen["optimizer"]: COLOURS[2], "SGD": COLOURS[0], "Adam": COLOURS[1]}
    labels = {seen["optimizer"]: title, **{k: f"{k}, rate {v:g}" for k, v in seen["rates"].items()}}
    with plt.rc_context(style()):
        figure, axes = plt.subplots(1, 3, figsize=(11.4, 3.3), layout="constrained")
        for name, curve in seen["loss"].items():
            x = np.arange(1, len(curve["mean"]) + 1)
            axes[0].plot(x, curve["mean"], color=colours[name], label=labels[name])
            axes[0].fill_between(
                x, curve["low"], curve["high"], color=colours[name], alpha=0.13, lw=0
            )
        axes[0].set(yscale="log", title="test loss", xlabel="step")
        alpha = seen.get("alpha")
        third = np.array(alpha)[..., 1] if alpha else np.array(seen["cosine"])
        for index, layer in enumerate(seen["layers"]):
            look = {"color": COLOURS[2 + index], "lw": 1.4}
            axes[1].plot(x, np.array(seen["norm"])[:, index], label=layer, **look)
            axes[2].plot(x, third[:, index], **look)
        axes[1].set(yscale="log", title=f"{title}: norm of the step, per layer", xlabel="step")
        what = "weight of Adam (the rest: SGD)" if alpha else "cosine of step and descent direction"
        axes[2].set(title=what, xlabel="step")
        axes[0].legend(fontsize=8)
        layers = axes[1].get_legend_handles_labels()
        figure.legend(*layers, loc="outside lower right", ncols=4, fontsize=8)
        save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description="the figures of docs/optimizers")
    parser.add_argument("names", nargs="*", default=[*CONFIG.exports, "velo"])
    parser.add_argument("--draw", action="store_true", help="draw the committed records again")
    args = parser.parse_args()
    for name in args.names:
        path = RECORDS / f"{name}.json" if args.draw else record(name)
        draw(path, IMAGES / f"{name}-run.png")


if __name__ == "__main__":
    main()
