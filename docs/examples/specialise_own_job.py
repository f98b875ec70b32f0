"""Specialise a learned optimizer to your own job: a Flax model, arrays, a batch size.

The job is `make_task`. From the folder of this file,

    metaopt train --task specialise_own_job:make_task --learned l3rs \\
        --base sgd,adam,lion --minutes 30 --out runs/own

meta-trains L3RS on it by evolution strategies and exports the best theta to runs/own/export.

    python specialise_own_job.py [--out FOLDER]

gives the same command with a budget of seconds, then trains the model with what was exported, and
with Adam at three learning rates, on images that the meta-training never saw.
"""

import argparse
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import optax
from sklearn.datasets import load_digits

import metaopt
from metaopt.cli import main as command_line
from metaopt.datasets import split_in_three

STEPS = 30  # of a run of the model's own training


class Scaled(nn.Module):
    """One hidden layer behind a scale per feature, which is a parameter of its own."""

    classes: int

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return nn.Dense(self.classes)(nn.tanh(nn.Dense(32)(scale * x)))


def make_task() -> metaopt.Task:
    """What `--task` names: any function without arguments that returns a task."""
    x, y = load_digits(return_X_y=True)  # here: 1797 images as rows of 64 numbers
    data = split_in_three("my digits", x.astype("float32"), y, 10, scale=1 / 16)
    return metaopt.tasks.classification(Scaled(10), data, batch_size=64)


def test_losses(task: metaopt.Task, tx: optax.GradientTransformation, seeds: int) -> jax.Array:
    """Trains the model for `STEPS` mini-batches and judges it on the test split, per seed."""

    def run(key):
        k_init, k_batches = jax.random.split(key)
        params, batches = task.init(k_init), task.sample(k_batches, (STEPS,))
        params, _, _ = metaopt.unroll(tx, params, tx.init(params), task.loss, batches)
        return task.loss(params, task.whole("test"))

    keys = jax.random.split(jax.random.key(0), seeds)
    return jax.jit(lambda keys: jax.lax.map(run, keys))(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder of the meta-training; default: a temporary one")
    folder = Path(parser.parse_args().out or tempfile.mkdtemp())
    budget = f"--steps 100 --validate-every 25 --nes.min-steps 10 --nes.max-steps {STEPS}"
    budget += " --nes.population 16 --nes.tasks 2 --nes.lr 0.02"
    job = "train --task specialise_own_job:make_task --learned l3rs --base sgd,adam,lion"
    if code := command_line([*job.split(), *budget.split(), "--out", str(folder)]):
        raise SystemExit(code)

    task = make_task()
    contenders = {f"Adam {rate}": optax.adam(rate) for rate in (1e-2, 3e-2, 1e-1)}
    contenders["L3RS, specialised"] = metaopt.load(folder).apply(num_steps=STEPS)
    for name, tx in contenders.items():
        losses = test_losses(task, tx, seeds=8)
        print(f"{name:18} test loss after {STEPS} steps, mean of 8 seeds: {losses.mean():.3f}")


if __name__ == "__main__":
    main()
