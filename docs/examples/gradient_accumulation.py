"""Gradient accumulation inside a guard: `optax.MultiSteps` around each runner.

    python docs/examples/gradient_accumulation.py [--steps N]

Each runner takes one step per four mini-batches, along the mean of their gradients, as plain AdamW
in `optax.MultiSteps` does. The guard is called once per mini-batch in any case, and compares the
losses on each of them. Put `MultiSteps` inside, not around the guard: a guard computes its own
gradients, so around it `MultiSteps` would call the guard with every fourth mini-batch alone.
"""

import argparse

import flax.linen as nn
import jax
import optax

import metaopt
from metaopt import guards
from metaopt.datasets import digits

EVERY = 4  # mini-batches per step
NET = nn.Sequential([lambda x: x.reshape(len(x), -1) / 16.0, nn.Dense(32), nn.relu, nn.Dense(10)])


def loss_fn(params, batch):
    logits = NET.apply(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def train_adamw(params, batches):
    """The loop without a guard."""
    tx = optax.MultiSteps(optax.adamw(1e-2), EVERY)
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = train_step(params, state, batch)
    return params


def train_guarded(params, batches, learned):
    """The same loop with a guard: the numbered lines differ."""
    tx = optax.MultiSteps(optax.adamw(1e-2), EVERY)
    tx = guards.race(optax.MultiSteps(learned, EVERY), tx, n_t=2 * EVERY)  # 1: the guard, outside
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, batch):
        value_fn = lambda params: loss_fn(params, batch)  # 2: the loss on this mini-batch
        updates, state = tx.update(None, state, params, value_fn=value_fn)  # 3: a function
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = train_step(params, state, batch)
    info = state.info
    print(f"decisions for the LSTM, for AdamW: {info.wins.tolist()}", end="; ")
    print(f"gradients per mini-batch: {info.gradient_evals / len(batches):.2f}")
    return params


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="mini-batches")
    steps = parser.parse_args(argv).steps

    data = digits().splits
    k_net, k_data = jax.random.split(jax.random.key(0))
    params = NET.init(k_net, data["train"]["x"][:1])
    batches = []
    for key in jax.random.split(k_data, steps):
        index = jax.random.randint(key, (16,), 0, len(data["train"]["y"]))
        batches.append(jax.tree.map(lambda leaf, index=index: leaf[index], data["train"]))

    # num_steps counts steps, not mini-batches.
    learned = metaopt.load("lstm-mlp-mnist-300").apply(num_steps=steps // EVERY)
    runs = {
        "AdamW": train_adamw(params, batches),
        "race(LSTM, AdamW)": train_guarded(params, batches, learned),
    }
    losses = {"start": float(loss_fn(params, data["test"]))}
    for name, trained in runs.items():
        losses[name] = float(loss_fn(trained, data["test"]))
        print(f"{name:18} test loss {losses[name]:.3f}")
    return losses


if __name__ == "__main__":
    main()
