"""Flax NNX with BatchNorm and Dropout, trained by AdamW and by a race around AdamW.

    python docs/examples/flax_nnx_batchnorm_dropout.py [--steps N]

`nnx.split` takes the params out of the model. What is left, the running statistics and the random
counts of Dropout, is the model state of the guard. Each runner has its own statistics; the counts
advance by one per mini-batch for all, so that all runners drop the same units.
"""

import argparse

import jax
import optax
from flax import nnx

import metaopt
from metaopt import guards
from metaopt.datasets import digits


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.hidden(x.reshape(len(x), -1) / 16.0)))
        return self.out(self.dropout(x))


def loss_fn(model: Net, batch):
    logits = model(batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def train_adamw(model: Net, batches):
    """The loop without a guard."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        grads = nnx.grad(loss_fn)(model, batch)
        optimizer.update(model, grads)

    for batch in batches:
        train_step(model, optimizer, batch)
    return model


def train_guarded(model: Net, batches, learned):
    """The loop with a guard, which needs the loss as a pure function."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx = guards.race(learned, optax.adamw(1e-2))  # 1: the guard around AdamW
    state = tx.init(params, rest)  # 2: the guard holds all that is no param

    @jax.jit
    def train_step(params, state, batch):
        def value_fn(params, rest):
            model = nnx.merge(graph, params, rest, copy=True)
            loss = loss_fn(model, batch)
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        updates, state = tx.update(None, state, params, value_fn=value_fn)  # 3: a function
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = train_step(params, state, batch)
    info = state.info
    print(f"decisions for the LSTM, for AdamW: {info.wins.tolist()}", end="; ")
    print(f"gradients per mini-batch: {info.gradient_evals / len(batches):.2f}")
    return nnx.merge(graph, params, guards.model_state(state))  # the leader's statistics


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="mini-batches")
    steps = parser.parse_args(argv).steps

    data = digits().splits
    keys = jax.random.split(jax.random.key(0), steps)
    index = jax.vmap(lambda key: jax.random.randint(key, (64,), 0, len(data["train"]["y"])))(keys)
    batches = [jax.tree.map(lambda leaf, i=i: leaf[i], data["train"]) for i in index]

    learned = metaopt.load("lstm-mlp-mnist-300").apply(num_steps=steps)
    runs = {
        "AdamW": train_adamw(Net(nnx.Rngs(0)), batches),
        "race(LSTM, AdamW)": train_guarded(Net(nnx.Rngs(0)), batches, learned),
    }
    losses = {}
    for name, model in runs.items():
        model.eval()  # running statistics, no dropout
        losses[name] = float(loss_fn(model, data["test"]))
        print(f"{name:18} test loss {losses[name]:.3f}")
    return losses


if __name__ == "__main__":
    main()
