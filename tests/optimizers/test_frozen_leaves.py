"""Leaves whose gradient is always zero, as of frozen weights: named once where they would move."""

import warnings

import contenders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import optimizers
from metaopt.core.rollouts import unroll
from metaopt.optimizers import features

PARAMS = {
    "body": np.ones((3, 2), np.float32),
    "head": np.ones(2, np.float32),
    "none": np.ones(0, np.float32),
}
QUIET = {
    "lstm": lambda: optimizers.lstm(hidden=2, layers=1, warn_frozen=False),
    "velo": contenders.LEARNED["velo"],
    "celo": contenders.LEARNED["celo"],
    "celo2": lambda: optimizers.celo2_adamw(warn_frozen=False),
    "adafac_mlp": lambda: optimizers.adafac_mlp(warn_frozen=False),
}
WARNING = {
    "lstm": lambda: optimizers.lstm(hidden=2, layers=1),
    "velo": lambda: optimizers.velo(hidden=4, bank=2),
    "celo": lambda: optimizers.celo(hidden=4),
    "celo2": optimizers.celo2_adamw,
    "adafac_mlp": optimizers.adafac_mlp,
}


def loss(params, batch):
    """`head` has no gradient on the first mini-batches, as behind a layer that starts at zero."""
    body = jnp.sum(jax.lax.stop_gradient(params["body"]))
    return jnp.sum(jnp.square(params["head"] - 2.0)) * (batch > 4.0) + body


def run(name, tables, steps=14, params=PARAMS, theta=None):
    theta = contenders.theta_of(name) if theta is None else theta
    tx = tables[name]().apply(jax.tree.map(jnp.asarray, theta), num_steps=100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = jax.jit(lambda x: unroll(tx, x, tx.init(x), loss, jnp.arange(float(steps)))[0])
        after = jax.block_until_ready(program(params))
        jax.effects_barrier()
    return after, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", WARNING)
def test_leaves_that_never_had_a_gradient_are_named_once(name):
    after, messages = run(name, WARNING)
    assert np.any(after["body"] != PARAMS["body"])  # hence the warning
    assert len(messages) == 1
    assert f"{name}: the gradient of body has been exactly zero" in messages[0]
    assert "optax.partition" in messages[0]


def test_no_warning_where_it_is_off_where_a_run_is_short_and_in_meta_training():
    assert run("lstm", QUIET)[1] == [] and run("lstm", WARNING, steps=10)[1] == []
    thetas = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), contenders.theta_of("lstm"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(jax.vmap(lambda theta: run("lstm", WARNING, theta=theta)[0]))(thetas)
        jax.effects_barrier()


@pytest.mark.parametrize("name", QUIET)
def test_a_program_without_warnings_has_no_callback(name):
    def calls(tables):
        tx = tables[name]().apply(contenders.theta_of(name), num_steps=100)
        state = jax.eval_shape(tx.init, PARAMS)
        step = lambda state: tx.update(PARAMS, state, PARAMS, value=jnp.float32(1.0))
        return str(jax.make_jaxpr(step)(state)).count("debug_callback")

    assert calls(WARNING) > 0 and calls(QUIET) == 0


class Converted:
    """An argument of a callback that may be converted, but not computed with."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def __array__(self, dtype=None, copy=None):
        return self.value

    def __int__(self):
        return int(self.value)

    def __bool__(self):
        return bool(self.value)

    def __eq__(self, other):
        raise AssertionError("a comparison is an operation of JAX")


def test_callbacks_compute_nothing_with_jax(monkeypatch):
    """An operation of JAX in a host callback may wait for the program that waits for it."""
    callbacks = []
    monkeypatch.setattr(jax.debug, "callback", lambda function, *args: callbacks.append(function))
    features.warn_at_horizon("velo", jnp.int32(3), jnp.int32(3))
    features.warn_of_frozen_leaves(
        "lstm", {"a": 1.0}, jnp.int32(10), jnp.int32(0), {"w": 1.0}, lambda: [jnp.array(True)]
    )
    at_horizon, of_frozen = callbacks
    with pytest.warns(UserWarning, match="velo: this run goes past its horizon num_steps=3"):
        at_horizon(Converted(3), Converted(3))
    with pytest.warns(UserWarning, match="lstm: the gradient of w has been exactly zero"):
        of_frozen(Converted(True), Converted([True]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at_horizon(Converted(2), Converted(3))
        of_frozen(Converted(False), Converted([True]))
        of_frozen(Converted(True), Converted([False]))


def test_the_advice_leaves_them_where_they_are():
    tx = optax.partition(
        {
            "learned": WARNING["lstm"]().apply(contenders.theta_of("lstm")),
            "frozen": optax.set_to_zero(),
        },
        {"body": "frozen", "head": "learned", "none": "learned"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = unroll(tx, PARAMS, tx.init(PARAMS), loss, jnp.arange(14.0))[0]
        jax.effects_barrier()
    np.testing.assert_array_equal(after["body"], PARAMS["body"])
    assert np.all(after["head"] != PARAMS["head"])
