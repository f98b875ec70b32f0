"""Plain JAX without a framework: params are a dict, and a guard trains them.

    python docs/examples/plain_jax.py

The guard is called once per mini-batch, as any optax transformation. Both optimizers train on every
mini-batch, and a decision follows after every tenth.
"""

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import guards
from metaopt.datasets import spirals

STEPS = 500  # mini-batches


def init(key, sizes=(2, 32, 32, 2)):
    keys = jax.random.split(key, len(sizes) - 1)
    layer = lambda key, n_in, n_out: {
        "w": jax.random.normal(key, (n_in, n_out)) * jnp.sqrt(2.0 / n_in),
        "b": jnp.zeros(n_out),
    }
    return {f"layer{i}": layer(key, *sizes[i : i + 2]) for i, key in enumerate(keys)}


def loss_fn(params, batch):
    x = batch["x"]
    for name in sorted(params):
        x = jnp.tanh(x) @ params[name]["w"] + params[name]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(x, batch["y"]).mean()


def batches(key, examples):
    for k in jax.random.split(key, STEPS):
        index = jax.random.randint(k, (64,), 0, len(examples["y"]))
        yield jax.tree.map(lambda leaf, index=index: leaf[index], examples)


def main() -> dict[str, float]:
    data = spirals().splits
    k_net, k_theta, k_data = jax.random.split(jax.random.key(0), 3)
    params = init(k_net)
    losses = {"start": float(loss_fn(params, data["test"]))}

    lstm = metaopt.optimizers.lstm()  # untrained and of no use: the guard keeps Adam's run
    learned = lstm.apply(lstm.init(k_theta, params))
    tx = guards.race(learned, optax.adam(1e-2))
    state = tx.init(params)

    @jax.jit
    def train_step(params, state, batch):
        value_fn = lambda params: loss_fn(params, batch)
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    for batch in batches(k_data, data["train"]):
        params, state = train_step(params, state, batch)

    losses["end"] = float(loss_fn(params, data["test"]))
    info = state.info
    print(f"test loss {losses['start']:.3f} -> {losses['end']:.3f}")
    print(f"decisions for the LSTM, for Adam: {info.wins.tolist()}")
    print(f"gradients per mini-batch: {info.gradient_evals / STEPS:.2f} (Adam alone: 1)")
    return losses


if __name__ == "__main__":
    main()
