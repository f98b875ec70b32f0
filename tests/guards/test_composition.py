"""Guards among optax's transformations; what may be done with their states."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import (
    assert_trees_equal,
    drive_steps,
    stream_of,
    tiny,
    whole_task,
)

from metaopt import guards
from metaopt.core.rollouts import unroll
from metaopt.tasks import quadratic

TASK = quadratic(5, noise=0.3)
START = TASK.init(jax.random.key(0))
FAMILY = tiny()
THETA = FAMILY.init(jax.random.key(1), START)


def learned(dtype=jnp.float32):
    return FAMILY.apply(optax.tree.cast(THETA, dtype))


MOMENTUM = optax.sgd(0.1, momentum=0.5)
ADAPTIVE = guards.Adaptive(cap=8)
GUARDS = {
    "race": lambda *dtype: guards.race(
        learned(*dtype), MOMENTUM, n_t=2, patience=1, trial=1, budget=0.4
    ),
    "race_held_out": lambda *dtype: guards.race(learned(*dtype), MOMENTUM, n_t=2, n_c=1),
    "lgl2o": lambda *dtype: guards.lgl2o(learned(*dtype), MOMENTUM, n_t=2, n_c=1),
    "lgl2o_adaptive": lambda *dtype: guards.lgl2o(
        learned(*dtype), MOMENTUM, n_t=2, n_c=2, adaptive=ADAPTIVE
    ),
    "gl2o": lambda *dtype: guards.gl2o(learned(*dtype), MOMENTUM),
    "smg": lambda *dtype: guards.smg(
        FAMILY, optax.tree.cast(THETA, *dtype or [None]), n_t=1, n_c=1
    ),
    "amg": lambda *dtype: guards.amg(
        FAMILY, optax.tree.cast(THETA, *dtype or [None]), n_t=1, n_c=1
    ),
}


def one_step(guard):
    @jax.jit
    def call(x, state, batch):
        updates, state = guard.update(None, state, x, value_fn=lambda p: TASK.loss(p, batch))
        return optax.apply_updates(x, updates), state

    return call


################################################################################
# States
################################################################################


@pytest.mark.parametrize("kind", GUARDS)
def test_states_are_copied_replaced_mapped_and_donated(kind):
    guard = GUARDS[kind]()
    call, batches = one_step(guard), stream_of(TASK, 6)
    x, state = START, guard.init(START)
    for batch in batches[:3]:
        x, state = call(x, state, batch)
    expected = call(x, state, batches[3])
    twins = [
        copy.copy(state),
        copy.deepcopy(state),
        state._replace(),
        jax.tree.map(lambda leaf: leaf, state),
        jax.tree.map(jnp.array, state),
        jax.device_get(state),
    ]
    for twin in twins:
        assert type(twin) is type(state)
        assert_trees_equal(twin.info, state.info)
        assert_trees_equal(call(x, twin, batches[3]), expected)
    donated = jax.jit(
        lambda x, state, batch: call(x, state, batch), donate_argnums=(0, 1)
    )  # no buffer is held twice
    y, other = jnp.array(START), guard.init(START)
    for batch in batches[:4]:
        y, other = donated(y, other, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), (y, other), expected
    )


@pytest.mark.parametrize("kind", GUARDS)
def test_diagnostics_before_the_first_decision_are_infinite_and_not_nan(kind):
    state = GUARDS[kind]().init(START)
    assert np.all(np.isposinf(state.info.losses)) and state.info.winner == -1
    assert not any(
        np.any(np.isnan(leaf))
        for leaf in jax.tree.leaves(state)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


################################################################################
# optax around and inside
################################################################################


@pytest.mark.parametrize("kind", ["race", "lgl2o", "gl2o", "smg"])
def test_a_chain_of_one_guard_is_the_guard(kind):
    guard = GUARDS[kind]()
    for (x, state), (y, (other,)) in zip(
        drive_steps(guard, TASK, START, 6, op_by_op=False),
        drive_steps(optax.chain(guard), TASK, START, 6, op_by_op=False),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
        assert_trees_equal(state, other)


INSIDE = {
    "masked": lambda: optax.chain(optax.masked(optax.trace(0.9), {"w": True, "b": False}),
                                  optax.sgd(0.1)),
    "partition": lambda: optax.partition(
        {"a": optax.sgd(0.1), "b": optax.adam(0.1)}, {"w": "a", "b": "b"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.sgd)(
        learning_rate=lambda t: 0.2 / (t + 1)
    ),
    "multi_steps": lambda: optax.MultiSteps(
        optax.adam(0.1), 3
    ).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "lookahead_free": lambda: optax.contrib.schedule_free_sgd(0.1),
    "backtracking": lambda: optax.chain(
        optax.sgd(0.5), optax.scale_by_backtracking_linesearch(5)
    ),
    "lbfgs": lambda: optax.lbfgs(memory_size=2),
    "gl2o": lambda: guards.gl2o(optax.sgd(0.3), optax.sgd(0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_a_transformation_inside_of_a_race_runs_as_alone(name):
    """As a fallback beside an adversary, and as a challenger beside a worse one."""
    params = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.3)}
    loss = lambda p, batch: jnp.sum((p["w"] - batch[:3]) ** 2) + (p["b"] - batch[3]) ** 2
    batches = 1.0 + 0.3 * jax.random.normal(jax.random.key(0), (8, 4))
    tx = INSIDE[name]()
    run = lambda tx: jax.jit(lambda x: unroll(tx, x, tx.init(x), loss, batches))(params)
    z, z_state, _ = run(tx)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for guard, index in (
        (guards.race(optax.scale(-jnp.nan), tx, n_t=2, patience=1, trial=1, budget=0.4), 1),
        (guards.race(tx, optax.sgd(0.0), n_t=2, patience=9), 0),
    ):
        _, state, _ = run(guard)
        runner = state.work.value.runners[index]
        jax.tree.map(close, runner.params, z)
        jax.tree.map(close, jax.tree.leaves(runner.state), jax.tree.leaves(z_state))


def test_a_line_search_is_a_fallback_of_lgl2o():
    guard = guards.lgl2o(optax.scale(3.0), optax.lbfgs(memory_size=2), n_t=2, n_c=1)
    task = whole_task()
    trail = drive_steps(guard, task, START, 6, op_by_op=False)
    losses = [float(task.loss(x, jnp.zeros(5))) for x, _ in trail]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.02 * losses[1]
