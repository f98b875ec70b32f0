"""Adversaries, tasks and drivers for the tests of all guards."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import guards
from metaopt.core.rollouts import windowed
from metaopt.core.types import LearnedOptimizer
from metaopt.tasks import quadratic


def constant(value: float):
    """Proposes the same step for every coordinate."""
    return optax.stateless(lambda updates, params: optax.tree.full_like(updates, value))


def noise(scale: float, seed: int = 0):
    """Proposes random steps."""
    return optax.chain(optax.scale(0.0), optax.add_noise(scale, 0.0, jax.random.key(seed)))


def nan_memory():
    """Takes good steps, but its memory becomes NaN."""

    def update(updates, state, params=None):
        del params
        return optax.tree.scale(-0.5, updates), {"memory": state["memory"] * jnp.nan}

    return optax.GradientTransformation(lambda params: {"memory": jnp.ones(3)}, update)


def tiny() -> LearnedOptimizer:
    """A recurrent coordinate-wise optimizer of a few operations (an LSTM is slow op by op)."""

    def init(key, params):
        del params
        rate, decay = jax.random.uniform(key, (2, 1), minval=0.1, maxval=0.9)
        return {"net": {"rate": rate, "decay": decay, "bias": jnp.zeros(1)}, "memory": jnp.zeros(1)}

    def apply(theta, *, num_steps=None):
        del num_steps
        net = theta["net"]

        def update(updates, state, params=None):
            del params
            state = net["decay"] * state - updates
            return net["rate"] * jnp.tanh(state) + net["bias"], state

        def init_fn(params):
            return jnp.repeat(theta["memory"], params.size)

        return optax.GradientTransformation(init_fn, update)

    def absorb(theta, state):
        return {**theta, "memory": jnp.mean(state, keepdims=True)}

    return LearnedOptimizer(init, apply, absorb)


FALLBACKS: dict[str, Any] = {
    "sgd": lambda: optax.sgd(lambda t: 0.5 / (t / 7.0 + 1.0) ** 1.5),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.05),
}

ADVERSARIES: dict[str, Any] = {
    "nan": lambda: constant(float("nan")),
    "inf": lambda: constant(float("inf")),
    "minus_inf": lambda: constant(-float("inf")),
    "1e30": lambda: constant(1e30),
    "ascent": lambda: optax.scale(3.0),
    "random": lambda: noise(10.0),
    "nothing": lambda: optax.set_to_zero(),
    "nan_memory": nan_memory,
    "fallback": FALLBACKS["sgd"],
    "good_then_harmful": lambda: optax.sgd(lambda t: jnp.where(t < 5, 0.4, -3.0)),
}
USELESS = ("nan", "inf", "minus_inf", "1e30")  # never better than anything finite


def stream_of(task, count: int, seed: int = 1):
    """Returns `count` mini-batches with a leading axis."""
    return task.sample(jax.random.key(seed), (count,))


def cut(batches, start: int, stop: int):
    return jax.tree.map(lambda leaf: leaf[start:stop], batches)


def rows(batches) -> list[Any]:
    """The mini-batches of a leading axis, one by one."""
    leaves, structure = jax.tree.flatten(batches)
    return [jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True)]


def drive(
    guard, task, params, num_windows: int, *, seed: int = 1, batches=None, op_by_op: bool = True
):
    """Returns (params, state) after each window, by the window form of `guard`.

    Exact comparisons hold op by op; compiled programs may differ in the last bit.
    """
    n_t, n_c = guard.window
    size = n_t + n_c
    if batches is None:
        batches = stream_of(task, num_windows * size, seed)
    tx, trail = guards.in_windows(guard), []
    with jax.disable_jit(op_by_op):
        state = tx.init(params)
        for w in range(0, num_windows * size, size):
            updates, state = tx.update(
                None,
                state,
                params,
                loss_fn=task.loss,
                train_batches=cut(batches, w, w + n_t),
                eval_batches=cut(batches, w + n_t, w + size) if n_c else None,
            )
            params = optax.apply_updates(params, updates)
            trail.append((params, state))
    return trail


def drive_steps(
    tx, task, params, num_steps: int, *, seed: int = 1, batches=None, op_by_op: bool = True
):
    """Returns (params, state) after each mini-batch, by ``tx.update`` with a `value_fn`.

    A guard computes gradients at its own points, and is given none.
    """
    if batches is None:
        batches = stream_of(task, num_steps, seed)
    tx, trail, is_guard = optax.with_extra_args_support(tx), [], isinstance(tx, guards.Guard)

    def call(params, state, batch):
        value_fn = lambda p: task.loss(p, batch)
        if is_guard:
            updates, state = tx.update(None, state, params, value_fn=value_fn)
        else:
            value, grad = jax.value_and_grad(value_fn)(params)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=value_fn
            )
        return optax.apply_updates(params, updates), state

    call = call if op_by_op else jax.jit(call)
    with jax.disable_jit(op_by_op):
        state = tx.init(params)
        for batch in rows(batches)[:num_steps]:
            params, state = call(params, state, batch)
            trail.append((params, state))
    return trail


def drive_stream(guard, task, params, num_windows: int, *, seed: int = 1, op_by_op: bool = True):
    """Does as `drive` with `guard` itself on the same mini-batches, one by one.

    Also asserts that params do not change inside a window, where the guard's runners are not the
    caller's.
    """
    size = sum(guard.window)
    trail = drive_steps(guard, task, params, num_windows * size, seed=seed, op_by_op=op_by_op)
    if guard.process.name != "race":
        before = params
        for i, (after, _) in enumerate(trail, start=1):
            if i % size:
                np.testing.assert_array_equal(after, before)
            before = after
    return trail[size - 1 :: size]


def drive_plain(tx, task, params, num_windows: int, window: tuple[int, int], *, seed: int = 1):
    """Does as `drive` with `windowed(tx)` on the training mini-batches of the same stream."""
    n_t, size = window[0], sum(window)
    batches = stream_of(task, num_windows * size, seed)
    plain, trail = windowed(tx), []
    with jax.disable_jit():
        state = plain.init(params)
        for w in range(0, num_windows * size, size):
            train = cut(batches, w, w + n_t)
            updates, state = plain.update(
                None, state, params, loss_fn=task.loss, train_batches=train
            )
            params = optax.apply_updates(params, updates)
            trail.append((params, state))
    return trail


def whole_task(dim: int = 5, condition: float = 10.0, largest: float = 1.0):
    """Returns a noiseless quadratic, of which every mini-batch is the full batch."""
    return quadratic(dim, condition=condition, noise=0.0, largest=largest)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            assert np.all(np.isfinite(leaf)), leaf
