"""A ResNet of your own, with BatchNorm and Dropout, as a task: optimizers compared on it.

    python docs/examples/batchnorm_task.py [--steps N]

`metaopt.tasks.classification` takes a Linen module whose `__call__` has an argument `train`. The
running statistics are the model state of the task; every mini-batch has a key for the dropout.
`metaopt.evaluate` runs optimizers and guards on it from the same params and mini-batches. Test
losses and accuracies are those of evaluation mode, with the running statistics of the params that
are judged.

The same function `make_task` is what the commands take:

    metaopt evaluate celo-adam --task batchnorm_task:make_task --num-steps 1000
    metaopt train --task batchnorm_task:make_task --out runs/own learned:l3rs
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import guards
from metaopt.datasets import digits


class ResNet(nn.Module):
    """A stem, one residual block and a read-out, for images of 8x8 pixels."""

    @nn.compact
    def __call__(self, x, train: bool):
        def conv(x, stride=1):
            x = metaopt.tasks.networks.Conv(8, 3, stride, padding="SAME", use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(conv(x, stride=2))
        x = nn.relu(x + conv(nn.relu(conv(x))))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


def make_task() -> metaopt.Task:
    return metaopt.tasks.classification(ResNet(), digits(), batch_size=64)


def train(task: metaopt.Task, tx, steps: int) -> tuple[jax.Array, jax.Array]:
    """One run by `metaopt.unroll`: training losses ``[steps]``, and the loss on the test split."""
    k_init, k_batches = jax.random.split(jax.random.key(0))

    @jax.jit
    def run(task):
        params = task.init(k_init)
        state = metaopt.init_state(tx, params, task.init_model_state(k_init))
        batches = task.sample(k_batches, (steps,))
        params, state, losses = metaopt.unroll(tx, params, state, task.loss, batches)
        return losses, task.eval_loss(params, metaopt.model_state(state), task.whole("test"))

    return run(task)


def main(argv=None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="a multiple of 20")
    steps = parser.parse_args(argv).steps

    task = make_task()
    losses, test_loss = train(task, optax.adam(1e-2), steps)
    print(f"Adam, one run: training loss {losses[-1]:.3f} at the end, test loss {test_loss:.3f}")

    learned = metaopt.load("lstm-cnn-fmnist-300")
    optimizers = {
        "Adam": lambda num_steps: optax.adam(1e-2),
        "race(LSTM, Adam)": lambda num_steps: guards.race(
            learned.apply(num_steps=num_steps), optax.adam(1e-2)
        ),
    }
    results = {}
    keys = jax.random.split(jax.random.key(1), 2)
    for name, make in optimizers.items():
        curves = metaopt.evaluate(make, task, num_steps=steps, keys=keys, window=20)
        loss, accuracy = (float(jnp.mean(m[:, -1])) for m in (curves.loss, curves.accuracy))
        print(f"{name:17} test loss {loss:.3f}, accuracy {accuracy:.1%}, mean of 2 runs")
        results[name] = {"loss": loss, "accuracy": accuracy}
    return results


if __name__ == "__main__":
    main()
