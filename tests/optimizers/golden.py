"""Replays the golden trajectories of tests/golden; nothing is imported from metaopt."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

FOLDER = Path(__file__).parents[1] / "golden"


def load(name):
    """Returns the arrays of a file by key."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def named_theta(data):
    """Returns the meta-parameters by name."""
    return {key: value for key, value in data.items() if key.startswith("theta/")}


def assert_reproduces(tx, data):
    """Feeds the gradients to `tx`, and compares params after every step. Returns the last state.

    The bounds of tests/golden/celo/README.md: relative to the root mean square of the tensor, and
    relative to that of the way gone.
    """
    names = [key.removeprefix("params/") for key in data if key.startswith("params/")]
    start = {name: np.float64(data[f"params/{name}"]) for name in names}
    params = {name: jnp.asarray(data[f"params/{name}"]) for name in names}
    tx = optax.with_extra_args_support(tx)
    state, update = tx.init(params), jax.jit(tx.update)
    num_steps = len(data[f"grads/{names[0]}"])
    losses = data.get("loss", np.ones(num_steps, np.float32))
    for t in range(num_steps):
        grads = {name: data[f"grads/{name}"][t] for name in names}
        updates, state = update(grads, state, params, value=losses[t])
        params = optax.apply_updates(params, updates)
        for name in names:
            actual, expected = np.float64(params[name]), np.float64(data[f"after/{name}"][t])
            assert np.all(np.isfinite(actual)), (name, t)
            error = np.max(np.abs(actual - expected))
            assert error <= 5e-4 * rms(expected), (name, t)
            way = expected - start[name]
            assert error <= 2e-3 * rms(way) + 2.4e-7 * rms(start[name]), (name, t)
    return state


def rms(x):
    return np.sqrt(np.mean(np.square(x)))
