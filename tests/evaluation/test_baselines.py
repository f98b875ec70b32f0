"""Tuning against hand-written runs, and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stateful

from metaopt import tasks
from metaopt.datasets import moons
from metaopt.evaluation import baselines
from metaopt.evaluation.baselines import BASELINES, Baseline, chosen, points, tune, tune_cached
from metaopt.evaluation.records import npz
from metaopt.tasks import networks, quadratic

TASK = quadratic(dim=4)
KEYS = jax.random.split(jax.random.key(0), 3)


def by_hand(tx, task, num_steps, window=10):
    """Validation loss after the last step of a plain optax loop, mean over the seeds."""
    losses = []
    gradient = jax.jit(jax.grad(task.loss))
    for key in KEYS:
        _, k_init, k_windows = jax.random.split(key, 3)
        x = task.init(k_init)
        state, update = tx.init(x), jax.jit(tx.update)
        for k_train, _ in jax.random.split(k_windows, (num_steps // window, 2)):
            for batch in task.sample(k_train, (window,)):
                updates, state = update(gradient(x, batch), state)
                x = optax.apply_updates(x, updates)
        losses.append(float(task.loss(x, task.whole("valid"))))
    return np.mean(losses)


def test_the_whole_grid_equals_single_runs():
    baseline = Baseline("Adam", optax.adam, points(("constant", "cosine"), lr=(0.01, 0.3)))
    record, grid = tune(baseline, TASK, num_steps=40, keys=KEYS, measure_every=2)
    expected = [
        by_hand(optax.adam(0.01), TASK, 40),
        by_hand(optax.adam(0.3), TASK, 40),
        by_hand(optax.adam(optax.cosine_decay_schedule(0.01, 40)), TASK, 40),
        by_hand(optax.adam(optax.cosine_decay_schedule(0.3, 40)), TASK, 40),
    ]
    np.testing.assert_allclose(record["loss"], expected, rtol=1e-4)
    assert record["point"] == record["grid"][int(np.argmin(expected))]
    np.testing.assert_allclose(grid.loss[:, :, -1].mean(axis=1), expected, rtol=1e-4)
    np.testing.assert_array_equal(grid.steps, [0, 20, 40])
    assert grid.loss.shape == (4, 3, 3)
    assert (record["runs"], record["grad_evals"]) == (12, 480)


def test_grids_are_searched_in_evaluation_mode():
    task = stateful.batchnorm_task(0.3)
    baseline = Baseline("SGD", optax.sgd, points(("constant",), lr=(0.03, 0.3)))
    record, _ = tune(baseline, task, num_steps=10, keys=KEYS[:2])
    expected = []
    for lr in (0.03, 0.3):
        losses = []
        for key in KEYS[:2]:
            _, k_init, k_windows = jax.random.split(key, 3)
            batches = task.sample(jax.random.split(k_windows, (1, 2))[0, 0], (10,))
            params, stats, _ = stateful.plain_loop(
                optax.sgd(lr), *stateful.first_variables(k_init, 0.3), batches, 0.3
            )
            losses.append(stateful.eval_loss(params, stats, task.whole("valid"), 0.3))
        expected.append(np.mean(losses))
    np.testing.assert_allclose(record["loss"], expected, rtol=1e-4)


def test_a_point_that_diverges_never_wins():
    baseline = Baseline("SGD", optax.sgd, points(("constant",), lr=(1e20, 1e-3)))
    record, _ = tune(baseline, TASK, num_steps=40, keys=KEYS)
    assert record["loss"][0] == np.inf and record["point"]["lr"] == 1e-3


def test_a_point_becomes_its_transformation():
    point = {"schedule": "power", "lr": 3.0, "tau": 50.0}
    tx = chosen(BASELINES["sgd-lgl2o"], point)(100)
    state = tx.init(jnp.zeros(2))
    for count in range(3):
        updates, state = tx.update(jnp.ones(2), state)
        np.testing.assert_allclose(updates, -3.0 / (count / 50.0 + 1) ** 1.5, rtol=1e-6)


def test_schedules_keep_their_last_rate_beyond_the_horizon():
    tx = chosen(BASELINES["sgd"], {"schedule": "cosine", "lr": 1.0})(4)
    state = tx.init(jnp.zeros(2))
    rates = []
    for _ in range(6):
        updates, state = tx.update(jnp.ones(2), state)
        rates.append(-float(updates[0]))
    last = 0.5 * (1 + np.cos(np.pi * 3 / 4))
    np.testing.assert_allclose(rates[3:], last, rtol=1e-6)


def test_head_only_baselines_train_the_head_only():
    task = tasks.classification(networks.MLP((8, 2)), moons(), batch_size=32)
    params = jax.jit(task.init)(jax.random.key(0))
    baseline = BASELINES["adam-l3rs-head"]
    tx = chosen(baseline, {"schedule": "constant", "lr": 1e-2}, head="Dense_1")(10)
    slope = jax.jit(lambda params, key: jax.grad(task.loss)(params, task.sample(key, ())))
    updates, _ = tx.update(slope(params, jax.random.key(1)), tx.init(params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["Dense_0"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(updates["Dense_1"]))


@pytest.mark.parametrize("name", [n for n in BASELINES if not BASELINES[n].head_only])
def test_built_in_baselines_can_be_tuned(name):
    record, grid = tune(BASELINES[name], TASK, num_steps=10, keys=KEYS[:1])
    assert len(record["loss"]) == len(grid.loss) == len(BASELINES[name].grid)


SEARCHED = Baseline("SGD", optax.sgd, points(("constant",), lr=(0.1, 0.3)))
SETTINGS = {"num_steps": 10, "keys": KEYS, "window": 5}


class TestCache:
    @pytest.mark.parametrize("task", [TASK, stateful.batchnorm_task()], ids=["plain", "stateful"])
    def test_a_search_runs_once(self, tmp_path, monkeypatch, task):
        first, grid = tune_cached(tmp_path, "q", SEARCHED, task, **SETTINGS)
        monkeypatch.setattr(baselines, "tune", lambda *a, **k: pytest.fail("searched again"))
        second, again = tune_cached(tmp_path, "q", SEARCHED, task, **SETTINGS)
        assert first == second
        np.testing.assert_array_equal(grid.loss, again.loss)

    @pytest.mark.parametrize("changed", ["grid", "steps", "keys", "task", "lost"])
    def test_another_search_is_not_reused(self, tmp_path, monkeypatch, changed):
        tune_cached(tmp_path, "q", SEARCHED, TASK, **SETTINGS)
        baseline, task, settings = SEARCHED, TASK, dict(SETTINGS)
        if changed == "grid":
            baseline = baseline._replace(grid=points(("constant",), lr=(0.1, 0.2)))
        elif changed == "steps":
            settings["num_steps"] = 15
        elif changed == "keys":
            settings["keys"] = jax.random.split(jax.random.key(1), 3)
        elif changed == "task":  # of the same name
            task = quadratic(dim=4, condition=20.0)
        else:
            (file,) = tmp_path.iterdir()
            file.unlink()
        searched = []
        monkeypatch.setattr(baselines, "tune", lambda *a, **k: searched.append(1) or tune(*a, **k))
        tune_cached(tmp_path, "q", baseline, task, **settings)
        assert searched

    def test_a_damaged_search_is_run_again(self, tmp_path, monkeypatch):
        """One cut in half, one with another learning rate's curves, one of another format."""
        record, grid = tune_cached(tmp_path, "q", SEARCHED, TASK, **SETTINGS)
        searched = []
        monkeypatch.setattr(baselines, "tune", lambda *a, **k: searched.append(1) or (record, grid))
        (file,) = tmp_path.iterdir()
        whole = file.read_bytes()
        swapped = npz(grid._replace(loss=grid.loss[::-1]))
        for damaged in (whole[: len(whole) // 2], whole[:65] + swapped, b"", b"{}", swapped):
            file.write_bytes(damaged)
            assert tune_cached(tmp_path, "q", SEARCHED, TASK, **SETTINGS)[0] == record
            assert file.read_bytes() == whole
        assert len(searched) == 5
