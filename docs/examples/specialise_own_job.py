"""Specialise a learned optimizer to your own job: a Flax model, arrays, a batch size.

The job is the function `make_task`. In the folder of this file, the command

    metaopt train --task specialise_own_job:make_task --minutes 30 --out runs/own learned:l3rs

meta-trains L3RS on it by evolution strategies and exports the best theta to runs/own/export. The
script

    python specialise_own_job.py [--out FOLDER]

runs this command for a few seconds. Then it trains the model with the exported optimizer and with
Adam at three learning rates, and compares the losses on test images, which the meta-training did
not see.
"""

import argparse
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import metaopt
from metaopt.cli import main as command_line
from metaopt.datasets import split_in_three

STEPS = 30  # of one training of the model


class Scaled(nn.Module):
    """One hidden layer behind a learned scale per feature."""

    classes: int

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return nn.Dense(self.classes)(nn.tanh(nn.Dense(32)(scale * x)))


def make_task() -> metaopt.Task:
    """The function that `--task` names; it has no arguments and returns a task."""
    x, y = load_digits(return_X_y=True)  # here: 1797 images as rows of 64 numbers
    data = split_in_three("my digits", x.astype("float32"), y, 10, scale=1 / 16)
    return metaopt.tasks.classification(Scaled(10), data, batch_size=64)


def test_losses(task: metaopt.Task, optimizer, settings, seeds: int = 8) -> jax.Array:
    """Trains the model with `optimizer(setting)` for each setting.

    Every setting starts from the same params and sees the same mini-batches. One compiled program
    trains all of them.

    Returns:
      Test losses ``[settings, seeds]``.
    """

    def run(setting_and_key):
        setting, key = setting_and_key
        k_init, k_batches = jax.random.split(key)
        tx, params = optimizer(setting), task.init(k_init)
        batches = task.sample(k_batches, (STEPS,))
        params, _, _ = metaopt.unroll(tx, params, tx.init(params), task.loss, batches)
        return task.loss(params, task.whole("test"))

    keys = jnp.tile(jax.random.split(jax.random.key(0), seeds), len(settings))
    pairs = jnp.repeat(settings, seeds), keys
    return jax.jit(lambda pairs: jax.lax.map(run, pairs))(pairs).reshape(-1, seeds)


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="folder of the meta-training; default: a temporary one")
    folder = Path(parser.parse_args(argv).out or tempfile.mkdtemp())
    job = "train --task specialise_own_job:make_task --steps 75 --validate-every 25"
    method = f"method:nes --method.min-steps 10 --method.max-steps {STEPS}"
    method += " --method.population 16 --method.tasks 2 --method.lr 0.02"
    words = [*job.split(), "--out", str(folder), "learned:l3rs", *method.split()]
    if code := command_line(words):
        raise SystemExit(code)

    task = make_task()
    rates = jnp.array([1e-2, 3e-2, 1e-1])
    losses = {
        f"Adam {rate:.2f}": float(of_rate.mean())
        for rate, of_rate in zip(rates, test_losses(task, optax.adam, rates), strict=True)
    }
    exported = metaopt.load(folder)
    learned = lambda num_steps: exported.apply(num_steps=num_steps)
    losses["L3RS, specialised"] = float(test_losses(task, learned, jnp.array([STEPS])).mean())
    for name, loss in losses.items():
        print(f"{name:18} test loss after {STEPS} steps, mean of 8 seeds: {loss:.3f}")
    return losses


if __name__ == "__main__":
    main()
