"""An Equinox model with BatchNorm, trained by AdamW and by a race around AdamW.

    python docs/examples/equinox_batchnorm.py [--steps N]

`eqx.partition` takes the params out of the model, and `eqx.nn.State` is the model state of the
guard: each runner has its own running statistics. Equinox is not part of metaopt; install it with
`pip install equinox`.
"""

import argparse

import equinox as eqx
import jax
import optax

import metaopt
from metaopt import guards
from metaopt.datasets import digits


class Net(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        k_hidden, k_out = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 32, key=k_hidden)
        self.norm = eqx.nn.BatchNorm(32, axis_name="batch", mode="batch", momentum=0.9)
        self.out = eqx.nn.Linear(32, 10, key=k_out)

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x.reshape(-1) / 16.0), state)
        return self.out(jax.nn.relu(x)), state


def loss_fn(model, model_state, batch):
    """Returns the loss and the new running statistics."""
    over_batch = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    logits, model_state = over_batch(batch["x"], model_state)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, model_state


def train_adamw(model, model_state, batches):
    """The loop without a guard."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optax.adamw(1e-2)
    state = tx.init(params)

    @jax.jit
    def train_step(params, model_state, state, batch):
        value_fn = lambda p, s: loss_fn(eqx.combine(p, static), s, batch)
        grads, model_state = jax.grad(value_fn, has_aux=True)(params, model_state)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), model_state, state

    for batch in batches:
        params, model_state, state = train_step(params, model_state, state, batch)
    return eqx.combine(params, static), model_state


def train_guarded(model, model_state, batches, learned):
    """The same loop with a guard: the numbered lines differ."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = guards.race(learned, optax.adamw(1e-2))  # 1: the guard around AdamW
    state = tx.init(params, model_state)  # 2: the guard holds the running statistics

    @jax.jit
    def train_step(params, state, batch):
        value_fn = lambda p, s: loss_fn(eqx.combine(p, static), s, batch)
        updates, state = tx.update(None, state, params, value_fn=value_fn)  # 3: a function
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = train_step(params, state, batch)
    info = state.info
    print(f"decisions for the LSTM, for AdamW: {info.wins.tolist()}", end="; ")
    print(f"gradients per mini-batch: {info.gradient_evals / len(batches):.2f}")
    return eqx.combine(params, static), guards.model_state(state)  # 4: the leader's


def main(argv=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="mini-batches")
    steps = parser.parse_args(argv).steps

    data = digits().splits
    k_net, k_data = jax.random.split(jax.random.key(0))
    model, model_state = eqx.nn.make_with_state(Net)(k_net)
    batches = []
    for key in jax.random.split(k_data, steps):
        index = jax.random.randint(key, (64,), 0, len(data["train"]["y"]))
        batches.append(jax.tree.map(lambda leaf, index=index: leaf[index], data["train"]))

    learned = metaopt.load("lstm-mlp-mnist-300").apply(num_steps=steps)
    runs = {
        "AdamW": train_adamw(model, model_state, batches),
        "race(LSTM, AdamW)": train_guarded(model, model_state, batches, learned),
    }
    losses = {}
    for name, (trained, statistics) in runs.items():
        loss, _ = loss_fn(eqx.nn.inference_mode(trained), statistics, data["test"])
        losses[name] = float(loss)
        print(f"{name:18} test loss {losses[name]:.3f}")
    return losses


if __name__ == "__main__":
    main()
