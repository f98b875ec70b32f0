"""Plain JAX without a framework: params are a dict, and a guard in window form trains them.

    python docs/examples/plain_jax.py

A window is one decision: ten mini-batches train, ten decide. `metaopt.windows` cuts a stream of
mini-batches into windows, and one compiled call processes a whole window.
"""

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import guards
from metaopt.datasets import spirals

STEPS = 1000  # mini-batches; half of them train, half of them only decide


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
    guard = guards.race(learned, optax.adam(1e-2))
    state, update = guard.init(params), jax.jit(guard.update, static_argnames="loss_fn")

    for train, held_out in metaopt.windows(batches(k_data, data["train"]), *guard.window):
        updates, state = update(
            None, state, params, loss_fn=loss_fn, train_batches=train, eval_batches=held_out
        )
        params = optax.apply_updates(params, updates)

    losses["end"] = float(loss_fn(params, data["test"]))
    wins = optax.tree_utils.tree_get(state, "wins")
    print(f"test loss {losses['start']:.3f} -> {losses['end']:.3f}")
    print(f"windows won by the LSTM, by Adam: {wins.tolist()}")
    return losses


if __name__ == "__main__":
    main()
