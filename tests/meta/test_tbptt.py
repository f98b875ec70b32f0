"""Truncated back-propagation against plain `jax.grad` and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.core.rollouts import unroll
from metaopt.core.types import LearnedOptimizer, Task, TaskFamily, single, transformation
from metaopt.meta import TBPTTConfig, tbptt
from metaopt.optimizers import lstm
from metaopt.tasks import quadratic

LOPT = lstm(hidden=4)


def linear(dim=3):
    """loss = batch . x: its gradient does not depend on x."""
    return Task(
        init=lambda key: jax.random.normal(key, (dim,)),
        loss=lambda x, batch: jnp.vdot(batch, x),
        sample=lambda key, shape, split="train": jax.random.normal(key, (*shape, dim)),
        whole=lambda split="test": jnp.ones(dim),
    )


def window_gradient(task, *, second_order, theta, steps=6):
    batches = task.sample(jax.random.key(7), (steps,))
    x = task.init(jax.random.key(8))

    def loss(theta):
        tx = LOPT.apply(theta)
        _, _, losses = unroll(tx, x, tx.init(x), task.loss, batches, second_order=second_order)
        return jnp.mean(losses)

    return jax.grad(loss)(theta)


def theta():
    return LOPT.init(jax.random.key(0), jnp.zeros(3))


def test_first_order_is_exact_where_gradients_do_not_depend_on_params():
    first = window_gradient(linear(), second_order=False, theta=theta())
    full = window_gradient(linear(), second_order=True, theta=theta())
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)


def test_first_order_gradient_equals_finite_differences_with_recorded_gradients():
    task, start = quadratic(dim=3), theta()
    batches = task.sample(jax.random.key(7), (6,))
    x = task.init(jax.random.key(8))

    def recorded(theta):
        tx, y, grads = LOPT.apply(theta), x, []
        state = tx.init(x)
        for batch in batches:
            grads.append(jax.grad(task.loss)(y, batch))
            updates, state = tx.update(grads[-1], state)
            y = y + updates
        return grads

    grads = recorded(start)

    def loss(theta):
        tx, y, total = LOPT.apply(theta), x, 0.0
        state = tx.init(x)
        for batch, grad in zip(batches, grads, strict=True):
            total = total + task.loss(y, batch) / 6
            updates, state = tx.update(grad, state)
            y = y + updates
        return total

    ours = window_gradient(task, second_order=False, theta=start)
    flat, unravel = jax.flatten_util.ravel_pytree(start)
    direction = unravel(jax.random.normal(jax.random.key(9), flat.shape))
    eps = 1e-2
    shifted = lambda s: loss(jax.tree.map(lambda t, d: t + s * eps * d, start, direction))
    numeric = (shifted(1.0) - shifted(-1.0)) / (2 * eps)
    np.testing.assert_allclose(optax.tree.vdot(ours, direction), numeric, rtol=2e-2)


def steps(config, task, n, start):
    trainer = tbptt(LOPT, single(task), config)
    state, step = trainer.init(jax.random.key(1), start), jax.jit(trainer.step)
    history = []
    for i in range(n):
        before = state
        state, metrics = step(jax.random.fold_in(jax.random.key(2), i), state)
        history.append((before, state, metrics))
    return history, trainer, step


@pytest.mark.parametrize(
    "truncation, half_life, average, objective",
    [(3, 0, 0.0, "loss"), (3, 1, 0.75, "loss"), (3, 0, 0.0, "log"), (6, 0, 0.0, "loss")],
)
def test_one_update_is_adam_on_the_gradient_of_the_window(
    truncation, half_life, average, objective
):
    """Replays a window by hand: carried params and state are constants, the rest plain grad."""
    task, start = quadratic(dim=3), theta()
    config = TBPTTConfig(
        **{"rollout": 6, "truncation": truncation, "lr": 0.01, "objective": objective},
        half_life=half_life,
        average=average,
    )
    history, trainer, _ = steps(config, task, 2, start)
    rates = [0.01, 0.005 if half_life else 0.01]
    np.testing.assert_allclose([metrics["lr"] for *_, metrics in history], rates)
    adam, expected, mean = optax.adam(lambda count: jnp.array(rates)[count]), start, start
    adam_state = adam.init(start)
    for i, (before, _, metrics) in enumerate(history):
        key = jax.random.split(jax.random.fold_in(jax.random.key(2), i), 1)[0]
        _, k_init, k_batches = jax.random.split(key, 3)
        fresh = int(before.phases[0].left[0]) == 0
        assert fresh == (i * truncation % 6 == 0)
        x = task.init(k_init)
        x = x if fresh else before.runs[0].params[0]
        batches = task.sample(k_batches, (truncation + 1,))

        def window(theta, fresh=fresh, x=x, before=before, batches=batches):
            tx = LOPT.apply(theta)
            state = tx.init(x) if fresh else jax.tree.map(lambda s: s[0], before.runs[0].state)
            y, _, losses = unroll(tx, x, state, task.loss, batches[:-1], second_order=False)
            return (jnp.sum(losses) + task.loss(y, batches[-1])) / (truncation + 1)

        loss, grad = jax.value_and_grad(window)(expected)
        if objective == "log":
            grad = jax.tree.map(lambda g, loss=loss: g / loss, grad)
        np.testing.assert_allclose(metrics["meta_loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grad), rtol=1e-4)
        updates, adam_state = adam.update(grad, adam_state)
        expected = optax.apply_updates(expected, updates)
        memory_moves = optax.tree.norm(grad["memory"]) > 0
        assert bool(memory_moves) == fresh  # h0 belongs to theta, and acts in first windows only
        mean = jax.tree.map(lambda m, t: average * m + (1 - average) * t, mean, expected)
    state = history[-1][1]
    for ours, replayed in ((state.theta, expected), (trainer.theta(state), mean)):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(replayed), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_rate_zero_changes_nothing_and_truncation_does_not_change_the_forward_run():
    task, start = quadratic(dim=3, noise=0.0), theta()
    short, *_ = steps(TBPTTConfig(rollout=6, truncation=2, lr=0.0), task, 3, start)
    for a, b in zip(jax.tree.leaves(short[-1][1].theta), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(a, b)
    x = short[0][1].runs[0].params[0]  # after the first window of the run
    tx = LOPT.apply(start)
    state = jax.tree.map(lambda s: s[0], short[0][1].runs[0].state)
    whole, _, _ = unroll(tx, x, state, task.loss, jnp.zeros((4, 3)))
    np.testing.assert_allclose(short[2][1].runs[0].params[0], whole, rtol=1e-6)


def test_training_lowers_the_window_loss():
    history, _, step = steps(
        TBPTTConfig(rollout=20, truncation=10, tasks=4, lr=1e-2), quadratic(dim=3), 60, theta()
    )
    losses = [float(h[2]["meta_loss"]) for h in history]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert step._cache_size() == 1


def test_a_loss_without_a_logarithm_counts_as_not_finite_and_moves_nothing():
    task, start = quadratic(dim=3), theta()
    below = task.replace(loss=lambda x, batch: task.loss(x, batch) - 100.0)
    config = TBPTTConfig(rollout=6, truncation=3, objective="log")
    ((_, state, metrics),), *_ = steps(config, below, 1, start)
    assert metrics["non_finite"] == 1
    for a, b in zip(jax.tree.leaves(state.theta), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_diverged_run_starts_afresh_and_theta_stays_finite():
    task = linear()
    broken = task.replace(loss=lambda x, batch: jnp.vdot(batch, x) * jnp.nan)
    history, *_ = steps(TBPTTConfig(rollout=6, truncation=3), broken, 2, theta())
    _, state, metrics = history[-1]
    assert metrics["non_finite"] == 1
    assert int(state.phases[0].left[0]) == 0
    for a, b in zip(jax.tree.leaves(state.theta), jax.tree.leaves(theta()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_gradient_that_is_not_finite_is_counted_though_losses_are():
    """sqrt has no derivative at 0, where the loss itself is fine."""

    def apply(theta, *, num_steps=None):
        move = lambda grads, state, params=None, **extra: (jnp.sqrt(0.0 * theta) * grads, state)
        return transformation(lambda params: (), move)

    lopt = LearnedOptimizer(lambda key, params: jnp.float32(1.0), apply)
    trainer = tbptt(lopt, single(quadratic(dim=3)), TBPTTConfig(rollout=4, truncation=2, tasks=3))
    state = trainer.init(jax.random.key(0), jnp.float32(1.0))
    for i in range(2):
        state, metrics = trainer.step(jax.random.key(i), state)
        assert metrics["non_finite"] == 3
        assert np.isfinite(metrics["meta_loss"])
    assert trainer.theta(state) == 1.0


def rate(broken_after=None):
    """Gradient descent at rate theta; after so many steps its updates are NaN."""

    def apply(theta, *, num_steps=None):
        def move(grads, count, params=None, **extra):
            broken = 0.0 if broken_after is None else jnp.where(count < broken_after, 0.0, jnp.nan)
            return jax.tree.map(lambda g: broken - theta * g, grads), count + 1

        return transformation(lambda params: jnp.zeros([], jnp.int32), move)

    return LearnedOptimizer(lambda key, params: jnp.float32(0.1), apply)


def test_the_gradient_is_the_mean_over_the_finite_runs():
    """Against gradients of single runs, taken by hand; every other task has a loss of NaN."""
    plain = quadratic(dim=3)
    family = TaskFamily(
        lambda key: jnp.where(jax.random.bernoulli(key), 1.0, jnp.nan),
        lambda scale: plain.replace(loss=lambda x, batch: scale * plain.loss(x, batch)),
    )
    trainer = tbptt(rate(), family, TBPTTConfig(rollout=4, truncation=4, tasks=6))
    state = trainer.init(jax.random.key(0), jnp.float32(0.1))
    after, metrics = jax.jit(trainer.step)(jax.random.key(3), state)
    h, expected = np.geomspace(0.1, 1.0, 3), []
    for key in jax.random.split(jax.random.key(3), 6):
        k_task, k_init, k_batches = jax.random.split(key, 3)
        if np.isnan(family.sample(k_task)):
            continue
        x, dx = np.asarray(plain.init(k_init), np.float64), np.zeros(3)  # dx: d x / d theta
        slopes = []
        for batch in np.asarray(plain.sample(k_batches, (5,)), np.float64):
            gradient = h * x + batch
            slopes.append(gradient @ dx)
            x, dx = x - 0.1 * gradient, dx - gradient  # first order: gradients are constants
        expected.append(np.mean(slopes))
    assert 0 < len(expected) < 6
    assert metrics["non_finite"] == 6 - len(expected)
    np.testing.assert_allclose(metrics["grad_norm"], abs(np.mean(expected)), rtol=1e-4)
    np.testing.assert_allclose(after.theta, 0.1 - 1e-3 * np.sign(np.mean(expected)), rtol=1e-4)


def test_runs_end_one_after_another_and_so_theta_moves_where_long_runs_diverge():
    """Every run turns NaN in its last window; there is always another that has not."""
    config = TBPTTConfig(rollout=8, truncation=2, tasks=4, lr=1e-4)
    trainer = tbptt(rate(broken_after=6), single(quadratic(dim=3)), config)
    state, step = trainer.init(jax.random.key(0), jnp.float32(0.1)), jax.jit(trainer.step)
    for i in range(12):
        before = float(state.theta)
        state, metrics = step(jax.random.fold_in(jax.random.key(1), i), state)
        assert metrics["non_finite"] == (i >= 3)  # the first whole run ends with window 3
        assert np.sum(np.asarray(state.phases[0].left) == 0) == 1
        assert np.isfinite(metrics["grad_norm"]) and float(state.theta) != before


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"rollout": 0}, "rollout"),
        ({"rollout": 100, "truncation": 30}, "multiple"),
        ({"tasks": 0}, "tasks"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        TBPTTConfig(**settings)
