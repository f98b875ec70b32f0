"""Both forms of every guard make the same decisions, and guards nest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import (
    ADVERSARIES,
    FALLBACKS,
    assert_finite,
    assert_trees_equal,
    drive,
    drive_stream,
    noise,
    stream_of,
    tiny,
)

from metaopt import guards
from metaopt.tasks import quadratic

TASK = quadratic(5, noise=0.3)
START = TASK.init(jax.random.key(0))
FAMILY = tiny()
THETA = FAMILY.init(jax.random.key(1), START)
ADAPTING = FAMILY.init(jax.random.key(10), START)  # the fallback pair wins at times

CASES = {
    "lgl2o": lambda: guards.lgl2o(FAMILY.apply(THETA), optax.adam(0.2), n_t=3, n_c=2),
    "lgl2o_fresh": lambda: guards.lgl2o(
        FAMILY.apply(THETA), optax.adam(0.2), n_t=2, n_c=3, memory="fresh"
    ),
    "race": lambda: guards.race(
        FAMILY.apply(THETA), optax.sgd(0.3), optax.adam(0.2), n_t=3, n_c=2, jumps=True
    ),
    "race_nan": lambda: guards.race(ADVERSARIES["nan"](), FALLBACKS["momentum"](), n_t=3, n_c=2),
    "smg": lambda: guards.smg(FAMILY, ADAPTING, n_t=3, n_c=2, lr_params=0.5, lr_theta=0.3),
    "amg": lambda: guards.amg(FAMILY, ADAPTING, n_t=3, n_c=2, lr_params=0.5, lr_theta=0.3),
}


def decisions(state):
    get = lambda key: optax.tree_utils.tree_get(state, key)
    return [int(get(k)) for k in ("winner", "windows", "gradient_evals", "loss_evals", "accepted")]


@pytest.mark.parametrize("case", CASES)
def test_a_stream_accepts_exactly_the_points_of_the_windows(case):
    """This includes smg and amg, whose streams differentiate a record of losses and gradients."""
    guard = CASES[case]()
    stream_trail, window_trail = drive_stream(guard, TASK, START, 3), drive(guard, TASK, START, 3)
    for (x, state), (y, other) in zip(stream_trail, window_trail, strict=True):
        np.testing.assert_array_equal(x, y)
        assert decisions(state) == decisions(other)
        if case in ("smg", "amg"):
            assert_trees_equal(state.guard.theta, other.theta)
    if case in ("smg", "amg"):  # theta went through the gradient of both forms
        rates = [state.theta["net"]["rate"] for _, state in window_trail]
        assert any(np.any(rate != ADAPTING["net"]["rate"]) for rate in rates)


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_stream_accepts_the_points_of_the_windows(case):
    guard = CASES[case]()
    stream_trail = drive_stream(guard, TASK, START, 3, op_by_op=False)
    for (x, state), (y, other) in zip(stream_trail, drive(guard, TASK, START, 3), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
        assert decisions(state) == decisions(other)


def test_a_stream_compiles_once():
    traces, tx = [], guards.streaming(CASES["lgl2o"]())

    @jax.jit
    def call(params, state, batch):
        traces.append(None)
        updates, state = tx.update(None, state, params, value_fn=lambda p: TASK.loss(p, batch))
        return optax.apply_updates(params, updates), state

    x, state = START, tx.init(START)
    for batch in stream_of(TASK, 11):
        x, state = call(x, state, batch)
    assert len(traces) == 1


def test_a_stream_under_vmap():
    tx = guards.streaming(CASES["race"]())

    def run(x, batches):
        def body(carry, batch):
            updates, state = tx.update(
                None, carry[1], carry[0], value_fn=lambda p: TASK.loss(p, batch)
            )
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (x, tx.init(x)), batches)[0]

    starts = jnp.stack([START, 2 * START])
    batches = jnp.stack([stream_of(TASK, 10, 1), stream_of(TASK, 10, 2)])
    vmapped, states = jax.jit(jax.vmap(run))(starts, batches)
    for i in range(2):
        single, state = jax.jit(run)(starts[i], batches[i])
        np.testing.assert_allclose(vmapped[i], single, rtol=1e-5, atol=1e-6)
        assert states.guard.info.wins[i].tolist() == state.guard.info.wins.tolist()


def test_a_guard_is_the_fallback_of_another():
    """The outer learned optimizer is useless, so the run is that of the inner guard."""
    inner = guards.race(FAMILY.apply(THETA), optax.sgd(0.3), n_t=3, n_c=1)
    guard = guards.lgl2o(ADVERSARIES["nan"](), guards.streaming(inner), n_t=4, n_c=2)
    batches = stream_of(TASK, 18)
    train = batches.reshape(3, 6, -1)[:, :4].reshape(12, -1)
    single = drive(inner, TASK, START, 3, batches=train)
    for (x, state), (y, other) in zip(
        drive(guard, TASK, START, 3, batches=batches), single, strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)
        assert not state.info.accepted
        assert decisions(state.fallback.guard) == decisions(other)


@pytest.mark.parametrize("on_reject", ["rollback", "advance", "reset"])
def test_a_guard_is_the_learned_optimizer_of_another(on_reject):
    """Its windows end elsewhere, its proposals are NaN, and it is rolled back at times."""
    inner = guards.lgl2o(ADVERSARIES["nan"](), optax.adam(0.3), n_t=2, n_c=1)
    guard = guards.lgl2o(guards.streaming(inner), optax.sgd(0.1), n_t=4, n_c=2, on_reject=on_reject)
    trail = drive(guard, TASK, START, 5)
    for x, state in trail:
        assert_finite(x)
        assert 0 <= int(state.learned.position) < 3
    if on_reject == "advance":  # the inner guard saw every mini-batch
        assert trail[-1][1].learned.guard.info.windows == 20 // 3


def test_random_numbers_in_a_state_pass_through():
    guard = guards.lgl2o(noise(0.1), optax.sgd(0.1), n_t=2, n_c=1)
    x, state = drive_stream(guard, TASK, START, 2, op_by_op=False)[-1]
    assert_finite(x)
    assert state.guard.info.windows == 2


def test_in_a_loop_written_for_lbfgs():
    """The loop passes a gradient, which the guard ignores, and params in a tree."""
    params = {"w": jnp.ones(3), "b": jnp.zeros((), jnp.bfloat16)}
    loss = lambda p: jnp.sum((p["w"] - 2.0) ** 2) + (p["b"].astype(jnp.float32) - 1.0) ** 2
    tx = guards.streaming(guards.lgl2o(optax.sgd(0.05), optax.sgd(0.01), n_t=2, n_c=1))

    @jax.jit
    def train_step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), loss(params)
    for _ in range(6):
        params, state = train_step(params, state)
    assert loss(params) < first
    assert params["b"].dtype == jnp.bfloat16


def test_errors():
    with pytest.raises(ValueError, match="streaming: takes a guard"):
        guards.streaming(optax.sgd(0.1))  # type: ignore[arg-type]
    tx = guards.streaming(CASES["lgl2o"]())
    with pytest.raises(ValueError, match="streaming: update is missing value_fn"):
        tx.update(START, tx.init(START), START)
    with pytest.raises(ValueError, match="streaming: update is missing params"):
        tx.update(START, tx.init(START), value_fn=lambda p: 0.0)
