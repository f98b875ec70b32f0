"""Curves against a loop written by hand; tuning against exhaustive search."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import guards
from metaopt.config import BASELINES
from metaopt.evaluation import Baseline, evaluate, tune
from metaopt.tasks import quadratic

TASK = quadratic(dim=4)
KEYS = jax.random.split(jax.random.key(0), 3)


def by_hand(lr, key, num_steps, window):
    """The same run step by step, with numpy's arithmetic."""
    k_init, k_windows = jax.random.split(key)
    h = np.geomspace(0.1, 1.0, 4)
    x = np.asarray(TASK.init(k_init), np.float64)
    losses = [0.5 * np.sum(h * x**2)]
    for k in jax.random.split(k_windows, num_steps // window):
        for batch in np.asarray(TASK.sample(jax.random.split(k)[0], (window,)), np.float64):
            x = x - lr * (h * x + batch)
        losses.append(0.5 * np.sum(h * x**2))
    return losses


def test_curves_are_those_of_the_loop_that_users_write():
    curves = evaluate(lambda n: optax.sgd(0.2), TASK, num_steps=20, keys=KEYS, window=5)
    np.testing.assert_array_equal(curves.steps, [0, 5, 10, 15, 20])
    expected = [by_hand(0.2, key, 20, 5) for key in KEYS]
    np.testing.assert_allclose(curves.loss, expected, rtol=1e-4)
    assert np.isnan(curves.accuracy).all()  # a quadratic has none


def test_all_optimizers_see_the_same_mini_batches():
    plain = evaluate(lambda n: optax.sgd(0.2), TASK, num_steps=20, keys=KEYS)
    guarded = evaluate(
        lambda n: guards.lgl2o(optax.sgd(jnp.nan), optax.sgd(0.2)),
        TASK,
        num_steps=20,
        keys=KEYS,
        guard=True,
        diagnostics=("accepted",),
    )
    np.testing.assert_allclose(guarded.loss, plain.loss, rtol=1e-5)
    assert guarded.state["accepted"].shape == (3, 2) and not guarded.state["accepted"].any()


def test_the_horizon_reaches_the_optimizer():
    seen = []
    evaluate(lambda n: (seen.append(n), optax.sgd(0.1))[1], TASK, num_steps=30, keys=KEYS)
    assert seen == [30]


@pytest.mark.parametrize("num_steps", [0, 7])
def test_num_steps_must_fill_windows(num_steps):
    with pytest.raises(ValueError, match=f"multiple of window=5, got {num_steps}"):
        evaluate(lambda n: optax.sgd(0.1), TASK, num_steps=num_steps, keys=KEYS, window=5)


def test_tuning_finds_the_best_point_and_records_the_grid():
    schedules = {
        "constant": lambda lr, n: lambda count: lr,
        "half": lambda lr, n: lambda count: 0.5 * lr,
    }
    rates = (0.001, 0.6, 1.5, 30.0)  # the last one diverges
    baseline = Baseline("SGD", optax.sgd, schedules, rates)
    record = tune(baseline, TASK, num_steps=400, keys=KEYS)
    grid = {
        (schedule, lr): loss
        for schedule, losses in record["grid"].items()
        for lr, loss in zip(rates, losses, strict=True)
    }
    best = min(grid, key=grid.__getitem__)
    assert (record["schedule"], record["lr"]) == best
    assert grid["constant", 30.0] == float("inf")
    assert grid["half", 0.001] > grid["constant", 0.001] > grid[best]  # too slow
    assert record["runs"] == 3 * 4 * 2
    tx = baseline.chosen(*best)(400)
    updates, _ = tx.update(jnp.ones(4), tx.init(jnp.ones(4)))
    factor = {"constant": 1.0, "half": 0.5}[best[0]]
    np.testing.assert_allclose(updates, -factor * best[1], rtol=1e-6)


def test_a_point_of_the_grid_is_the_run_of_its_transformation():
    record = tune(BASELINES["adam"], TASK, num_steps=20, keys=KEYS)
    tx = optax.adam(optax.cosine_decay_schedule(0.01, 20))
    losses = []
    for key in KEYS:
        k_init, k_batches = jax.random.split(key)
        x = TASK.init(k_init)
        state = tx.init(x)
        for batch in TASK.sample(k_batches, (20,)):
            updates, state = tx.update(jax.grad(TASK.loss)(x, batch), state)
            x = x + updates
        losses.append(TASK.loss(x, TASK.whole()))
    found = record["grid"]["cosine"][record["rates"].index(0.01)]
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_built_in_baselines_run_with_traced_rates(name):
    record = tune(BASELINES[name], TASK, num_steps=10, keys=KEYS[:1])
    assert sorted(record["grid"]) == ["constant", "cosine"]
