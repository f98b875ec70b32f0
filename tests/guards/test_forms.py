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
    drive_steps,
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
    "lgl2o_train": lambda: guards.lgl2o(FAMILY.apply(THETA), optax.adam(0.2), n_t=4, n_c=0),
    "race": lambda: guards.race(
        FAMILY.apply(THETA), optax.sgd(0.3), optax.adam(0.2), n_t=3, patience=1, trial=1, budget=0.4
    ),
    "race_single": lambda: guards.race(optax.sgd(0.3), optax.sgd(0.2), n_t=1, smoothing=0),
    "race_held_out": lambda: guards.race(
        FAMILY.apply(THETA), optax.sgd(0.3), optax.adam(0.2), n_t=3, n_c=2
    ),
    "race_nan": lambda: guards.race(ADVERSARIES["nan"](), FALLBACKS["momentum"](), n_t=3, n_c=2),
    "smg": lambda: guards.smg(FAMILY, ADAPTING, n_t=3, n_c=2, lr_params=0.5, lr_theta=0.3),
    "amg": lambda: guards.amg(FAMILY, ADAPTING, n_t=3, n_c=2, lr_params=0.5, lr_theta=0.3),
}


def decisions(state):
    info = state.info
    return [int(v) for v in (*info.wins, info.windows, info.gradient_evals, info.loss_evals)]


@pytest.mark.parametrize("case", CASES)
def test_a_stream_accepts_exactly_the_points_of_the_windows(case):
    """All that decisions leave is equal too: theta of smg and amg, and states of optimizers."""
    guard = CASES[case]()
    stream_trail, window_trail = drive_stream(guard, TASK, START, 3), drive(guard, TASK, START, 3)
    for (x, state), (y, other) in zip(stream_trail, window_trail, strict=True):
        assert_trees_equal(state.memory, other.memory)
        if case.startswith("race"):  # a sum of updates may differ from their total in the last bit
            assert_trees_equal(state.work.value.runners, other.work.value.runners)
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(x, y)
    if case in ("smg", "amg"):  # theta went through the gradient
        rates = [state.memory.theta["net"]["rate"] for _, state in window_trail]
        assert any(np.any(rate != ADAPTING["net"]["rate"]) for rate in rates)


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_stream_compiles_once_and_accepts_the_points_of_the_windows(case):
    guard, traces = CASES[case](), []
    traced = TASK.replace(loss=lambda x, batch: traces.append(None) or TASK.loss(x, batch))
    stream_trail = drive_stream(guard, traced, START, 1, op_by_op=False)
    once = len(traces)
    stream_trail = drive_stream(guard, traced, START, 3, op_by_op=False)
    assert len(traces) == 2 * once
    for (x, state), (y, other) in zip(stream_trail, drive(guard, TASK, START, 3), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
        assert decisions(state) == decisions(other)


def test_a_window_form_may_go_on_with_the_state_of_a_stream_and_back():
    guard = CASES["lgl2o"]()
    batches = stream_of(TASK, 10)
    (x, state), *_ = drive_stream(guard, TASK, START, 1)
    with jax.disable_jit():
        _, state = guards.in_windows(guard).update(
            None,
            state,
            x,
            loss_fn=TASK.loss,
            train_batches=batches[5:8],
            eval_batches=batches[8:],
        )
    _, expected = drive(guard, TASK, START, 2)[-1]
    assert_trees_equal(state.memory, expected.memory)
    jax.eval_shape(lambda s: guard.update(None, s, x, value_fn=jnp.sum), state)


@pytest.mark.parametrize("case", ["race", "race_held_out", "lgl2o"])
def test_a_stream_under_vmap(case):
    guard = CASES[case]()

    def run(x, batches):
        def body(carry, batch):
            updates, state = guard.update(
                None, carry[1], carry[0], value_fn=lambda p: TASK.loss(p, batch)
            )
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (x, guard.init(x)), batches)[0]

    starts = jnp.stack([START, 2 * START])
    batches = jnp.stack([stream_of(TASK, 16, 1), stream_of(TASK, 16, 2)])
    vmapped, states = jax.jit(jax.vmap(run))(starts, batches)
    for i in range(2):
        single, state = jax.jit(run)(starts[i], batches[i])
        np.testing.assert_allclose(vmapped[i], single, rtol=1e-5, atol=1e-6)
        assert decisions(jax.tree.map(lambda leaf, i=i: leaf[i], states)) == decisions(state)


def test_a_guard_is_the_fallback_of_another():
    """The outer learned optimizer is useless, so the run is that of the inner guard."""
    inner = guards.race(FAMILY.apply(THETA), optax.sgd(0.3), n_t=3, n_c=1)
    batches = stream_of(TASK, 18)
    train = batches.reshape(3, 6, -1)[:, :4].reshape(12, -1)
    outer = guards.lgl2o(ADVERSARIES["nan"](), inner, n_t=4, n_c=2)
    single = drive(inner, TASK, START, 3, batches=train)
    for (x, state), (y, other) in zip(
        drive(outer, TASK, START, 3, batches=batches), single, strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)
        assert not state.info.accepted
        assert decisions(state.memory.fallback) == decisions(other)
    outer = guards.race(ADVERSARIES["nan"](), inner, n_t=2)  # any sizes of windows
    for (x, state), (y, other) in zip(
        drive_stream(outer, TASK, START, 6)[1::2], drive_stream(inner, TASK, START, 3), strict=True
    ):
        np.testing.assert_array_equal(state.work.value.runners[1].params, y)
        assert_trees_equal(state.work.value.runners[1].state, other)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("on_reject", ["rollback", "advance", "reset"])
def test_a_guard_is_the_learned_optimizer_of_another(on_reject):
    """Its windows end elsewhere, its proposals are NaN, and it is rolled back at times."""
    inner = guards.lgl2o(ADVERSARIES["nan"](), optax.adam(0.3), n_t=2, n_c=1)
    guard = guards.lgl2o(inner, optax.sgd(0.1), n_t=4, n_c=2, on_reject=on_reject)
    trail = drive(guard, TASK, START, 5)
    for x, state in trail:
        assert_finite(x)
        assert 0 <= int(state.memory.learned.position) < 3
    if on_reject == "advance":  # the inner guard saw every mini-batch
        assert trail[-1][1].memory.learned.info.windows == 20 // 3


def test_random_numbers_in_a_state_pass_through():
    for guard in (
        guards.lgl2o(noise(0.1), optax.sgd(0.1), n_t=2, n_c=1),
        guards.race(noise(0.1), optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.9, 3)), n_t=3),
    ):
        for op_by_op in (False, True):
            x, state = drive_stream(guard, TASK, START, 2, op_by_op=op_by_op)[-1]
            assert_finite(x)
            assert state.info.windows == 2


def test_in_a_loop_written_for_lbfgs():
    """The loop passes a gradient, which the guard ignores, and params in a tree."""
    params = {"w": jnp.ones(3), "b": jnp.zeros((), jnp.bfloat16)}
    loss = lambda p: jnp.sum((p["w"] - 2.0) ** 2) + (p["b"].astype(jnp.float32) - 1.0) ** 2
    for make, sizes in ((guards.lgl2o, dict(n_t=2, n_c=1)), (guards.race, dict(n_t=2))):
        tx = make(optax.sgd(0.05), optax.sgd(0.01), **sizes)

        @jax.jit
        def train_step(params, state, tx=tx):
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
            return optax.apply_updates(params, updates), state

        state, x = tx.init(params), params
        for _ in range(6):
            x, state = train_step(x, state)
        assert loss(x) < loss(params)
        assert x["b"].dtype == jnp.bfloat16


def test_the_callers_gradient_is_ignored_and_not_computed():
    """XLA drops the caller's gradient: the program is that of a call without it."""
    for guard in (CASES["lgl2o"](), CASES["race"]()):

        def call(x, state, batch, given, guard=guard):
            value_fn = lambda p: TASK.loss(p, batch)
            grads = jax.grad(value_fn)(x) if given else None
            return guard.update(grads, state, x, value_fn=value_fn)

        program = jax.jit(call, static_argnums=3)
        arguments = (START, guard.init(START), stream_of(TASK, 1)[0])
        assert_trees_equal(program(*arguments, True), program(*arguments, False))
        flops = [
            program.lower(*arguments, given).compile().cost_analysis()["flops"]
            for given in (True, False)
        ]
        assert flops[0] == flops[1]


def test_steps_without_windows_are_those_of_gl2o():
    guard = guards.gl2o(optax.sgd(0.9), optax.adam(0.1))
    assert guard.process is None and guard.window == (1, 0)
    x, state = drive_steps(guard, TASK, START, 3)[-1]
    y, other = drive(guard, TASK, START, 3)[-1]
    np.testing.assert_allclose(x, y, rtol=1e-6)
    assert decisions(state) == decisions(other)
