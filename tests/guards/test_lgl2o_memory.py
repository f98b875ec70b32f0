"""LGL2O's rules for the states of both optimizers after won and lost windows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import drive, drive_plain, tiny, whole_task

from metaopt import guards
from metaopt.tasks import quadratic

TASK = quadratic(5, noise=0.3)


@pytest.mark.parametrize("on_reject", ["rollback", "advance", "reset"])
def test_memory_after_a_lost_window(on_reject):
    learned = lambda: optax.sgd(lambda t: jnp.where(t < 3, 0.05, -5.0), momentum=0.5)
    guard = guards.lgl2o(learned(), optax.sgd(0.01), n_t=3, n_c=2, on_reject=on_reject)
    x = TASK.init(jax.random.key(0))
    (_, won), (_, lost) = drive(guard, TASK, x, 2)
    assert won.info.accepted and not lost.info.accepted
    trace = lambda state: optax.tree_utils.tree_get(state.memory.learned, "trace")
    assert optax.tree_utils.tree_get(lost.memory.learned, "count") == 6  # step counts are global
    if on_reject == "rollback":
        np.testing.assert_array_equal(trace(lost), trace(won))
    elif on_reject == "reset":
        np.testing.assert_array_equal(trace(lost), jnp.zeros(5))
    else:
        plain = drive_plain(learned(), TASK, x, 2, guard.window)
        np.testing.assert_array_equal(trace(lost), [s for _, s in plain][1][0].trace)


@pytest.mark.parametrize("rule", ["advance", "rollback"])
def test_state_of_a_fallback_that_lost(rule):
    """Its schedule goes on in both cases."""
    fallback = lambda: optax.sgd(lambda t: 1e-6 * t, momentum=0.9)
    guard = guards.lgl2o(optax.sgd(0.3), fallback(), n_t=3, n_c=2, fallback_on_reject=rule)
    _, state = drive(guard, TASK, jnp.full(5, 4.0), 1)[0]
    assert state.info.accepted
    assert optax.tree_utils.tree_get(state.memory.fallback, "count") == 3
    moved = np.any(optax.tree_utils.tree_get(state.memory.fallback, "trace") != 0)
    assert moved == (rule == "advance")


@pytest.mark.parametrize("rule", ["advance", "rollback"])
def test_the_bias_correction_of_an_adam_that_lost(rule):
    """Rolled back to before its first gradient, its next step is a first one: lr * sign(g)."""
    task, lr = whole_task(), 0.05
    learned = optax.sgd(lambda t: jnp.where(t == 0, 0.4, jnp.nan))  # wins once
    guard = guards.lgl2o(learned, optax.adam(lr), n_t=1, n_c=1, fallback_on_reject=rule)
    (x, won), (after, lost) = drive(guard, task, jnp.full(5, 3.0), 2)
    assert won.info.accepted and not lost.info.accepted
    g = [jax.grad(task.loss)(at, jnp.zeros(5)) for at in (jnp.full(5, 3.0), x)]
    if rule == "rollback":
        expected = lr * np.sign(g[1])
    else:  # Adam's second step, by hand
        m = 0.1 * (0.9 * g[0] + g[1]) / (1 - 0.9**2)
        v = 0.001 * (0.999 * g[0] ** 2 + g[1] ** 2) / (1 - 0.999**2)
        expected = lr * m / np.sqrt(v)
    np.testing.assert_allclose(x - after, expected, rtol=1e-4)


def test_fresh_memory_starts_every_window_from_the_initial_one():
    """w/o Update: each window alone equals a first window."""
    learned = lambda: optax.sgd(0.1, momentum=0.9)
    guard = guards.lgl2o(learned(), optax.sgd(0.0), n_t=3, n_c=2, memory="fresh")
    first = guards.lgl2o(learned(), optax.sgd(0.0), n_t=3, n_c=2)
    task = whole_task()
    x = task.init(jax.random.key(0))
    for after, state in drive(guard, task, x, 3):
        assert state.info.accepted
        expected, _ = drive(first, task, x, 1)[0]
        np.testing.assert_array_equal(after, expected)
        x = after


def test_averaged_memory_is_the_mean_over_coordinates():
    learned = tiny()
    theta = learned.init(jax.random.key(1), jnp.zeros(5))
    tx, x = learned.apply(theta), TASK.init(jax.random.key(0))
    options = dict(n_t=3, n_c=2, on_reject="advance")
    plain = guards.lgl2o(tx, optax.sgd(0.1), **options)
    mean = guards.lgl2o(
        tx, optax.sgd(0.1), average=guards.average_memory(learned, theta), **options
    )
    (_, state), (_, averaged) = (drive(guard, TASK, x, 1)[0] for guard in (plain, mean))
    expected = jnp.full(5, jnp.mean(state.memory.learned))
    np.testing.assert_allclose(averaged.memory.learned, expected, rtol=1e-6)
