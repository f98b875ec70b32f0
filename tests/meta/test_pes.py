"""PES: unbiased where truncated estimates are not, de-phased, and safe with diverging runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.core.types import LearnedOptimizer, Task, single, transformation
from metaopt.meta import PESConfig, pes

ROLLOUT, TRUNCATION, RATE = 12, 3, 0.01


def schedule_optimizer():
    """SGD whose learning rate is ``theta[0] + theta[1] * t / K``: a schedule of two parameters."""

    def apply(theta, *, num_steps=None):
        def update(grads, t, params=None, **extra):
            rate = theta[0] + theta[1] * t / num_steps
            return -rate * grads, t + 1

        return transformation(lambda params: jnp.zeros([], jnp.int32), update)

    return LearnedOptimizer(lambda key, params: jnp.array([0.1, 0.05]), apply)


def parabola():
    """loss = x^2 / 2 from x = 1: after rates r_1 .. r_t, x is the product of (1 - r)."""
    return Task(
        init=lambda key: jnp.float32(1.0),
        loss=lambda x, batch: 0.5 * x**2,
        sample=lambda key, shape, split="train": jnp.zeros((*shape, 1)),
        whole=lambda split="test": jnp.zeros(1),
    )


def mean_loss(theta, first=0, last=ROLLOUT, x=1.0):
    """Mean of the losses before steps `first` .. `last` of a run that is at `x` before `first`."""
    total = 0.0
    for t in range(first, last):
        total += 0.5 * x**2
        x = x * (1.0 - theta[0] - theta[1] * t / ROLLOUT)
    return total / (last - first)


def position(theta, t):
    x = 1.0
    for s in range(t):
        x = x * (1.0 - theta[0] - theta[1] * s / ROLLOUT)
    return x


def make(task=None, **settings):
    lopt = schedule_optimizer()
    theta = lopt.init(None, None)
    defaults = {
        "rollout": ROLLOUT,
        "truncation": TRUNCATION,
        "population": 64,
        "sigma": 0.01,
        "lr": 1e-6,
        "optimizer": "sgd",
        "half_life": 0,
    }
    trainer = pes(lopt, single(task or parabola()), PESConfig(**{**defaults, **settings}))
    return theta, trainer


@functools.cache
def estimates(persistent, generations=600):
    """The estimates ``[generations, 2]``, read off the steps of SGD with a tiny rate."""
    theta, trainer = make(persistent=persistent, lr=RATE)

    def body(state, key):
        after, _ = trainer.step(key, state)
        moved = trainer.theta(after) - trainer.theta(state)
        # Held at the same theta, so that all are estimates of one gradient.
        strategy = after.strategy.replace(mean=theta)
        return after._replace(theta=theta, strategy=strategy), moved / -RATE

    keys = jax.random.split(jax.random.key(1), generations)
    state = trainer.init(jax.random.key(0), theta)
    return np.asarray(jax.jit(lambda s: jax.lax.scan(body, s, keys)[1])(state))


def mean_and_error(values):
    """Mean and its standard error, by means over batches long enough to be independent."""
    batches = values[len(values) % 20 :].reshape(20, -1, 2).mean(axis=1)
    return batches.mean(axis=0), batches.std(axis=0, ddof=1) / np.sqrt(len(batches))


def test_pes_estimates_the_gradient_of_whole_runs_and_truncated_es_does_not():
    theta = np.array([0.1, 0.05])
    full = np.asarray(jax.grad(mean_loss)(jnp.asarray(theta)))
    steps = range(0, ROLLOUT, TRUNCATION)
    cut = np.mean(
        [
            jax.grad(functools.partial(mean_loss, first=t, last=t + TRUNCATION))(
                jnp.asarray(theta), x=position(theta, t)
            )
            for t in steps
        ],
        axis=0,
    )
    assert (np.abs(full) > 2 * np.abs(cut)).all()  # the bias is large here
    settle = ROLLOUT // TRUNCATION  # generations until all phases are present
    pes_mean, pes_error = mean_and_error(estimates(True)[settle:])
    es_mean, es_error = mean_and_error(estimates(False)[settle:])
    assert (pes_error < 0.1 * np.abs(full)).all()
    assert (np.abs(pes_mean - full) < 4 * pes_error).all(), (pes_mean, pes_error, full)
    assert (np.abs(es_mean - cut) < 4 * es_error).all(), (es_mean, es_error, cut)
    assert (np.abs(es_mean - full) > 10 * es_error).all()


def test_runs_end_one_pair_after_another():
    theta, trainer = make(population=16)
    state, step = trainer.init(jax.random.key(0), theta), jax.jit(trainer.step)
    ended = []
    for i in range(12):
        state, metrics = step(jax.random.fold_in(jax.random.key(1), i), state)
        ended.append(np.asarray(state.phase.left) == 0)
        noise = np.asarray(state.strategy.pert_accum).reshape(2, 8, 2)
        np.testing.assert_array_equal(noise[0] == 0, noise[1] == 0)
        np.testing.assert_array_equal((noise[0] == 0).all(axis=1), ended[-1])
    np.testing.assert_array_equal(np.sum(ended, axis=1), 2)  # of 8 pairs with runs of 4 windows
    np.testing.assert_array_equal(np.sum(ended, axis=0), 3)
    assert step._cache_size() == 1
    assert metrics["inner_steps"] == 16 * TRUNCATION


def test_noise_of_other_sigmas_is_carried_in_todays_unit():
    """sum of noise_t / sigma_t^2 over a run, whatever evosax divides by at its end."""
    theta, trainer = make(population=2, half_life=1, rollout=9)
    state = trainer.init(jax.random.key(0), theta)
    # The only pair: its first run is cut to 1 window, the second takes all 3.
    sigmas = [0.01 * 0.5**g for g in range(4)]
    noise, total = [], np.zeros(2)
    for g in range(4):
        before = state
        state, metrics = trainer.step(jax.random.fold_in(jax.random.key(1), g), state)
        np.testing.assert_allclose(metrics["sigma"], sigmas[g], rtol=1e-6)
        if g in (1, 2):
            carried = np.asarray(before.strategy.pert_accum[0]) / sigmas[g - 1] ** 2
            now = np.asarray(state.strategy.pert_accum[0]) / sigmas[g] ** 2
            noise.append(now - carried)
            total += noise[-1]
            np.testing.assert_allclose(now, total, rtol=1e-4)
    # Standard normal noise over sigma: of size 1 / sigma, twice as large a generation later.
    assert all(np.abs(n * s).max() < 5 for n, s in zip(noise, sigmas[1:3], strict=True))


def test_diverging_runs_are_counted_cost_as_much_as_the_worst_and_start_afresh():
    """A larger rate is better until it falls off a cliff, where one of every first pair stands."""
    task = parabola().replace(loss=lambda x, batch: jnp.where(x < 0.9, jnp.nan, 0.5 * x**2))
    theta, trainer = make(
        task=task, optimizer="adam", lr=1e-3, sigma=0.02, population=32, rollout=4, truncation=2
    )
    state, step = trainer.init(jax.random.key(0), theta), jax.jit(trainer.step)
    for i in range(12):
        state, metrics = step(jax.random.fold_in(jax.random.key(1), i), state)
        if i == 0:
            assert metrics["non_finite"] == 16
            np.testing.assert_array_equal(state.phase.left, 0)
            np.testing.assert_array_equal(state.strategy.pert_accum, 0.0)
        assert np.isfinite(trainer.theta(state)).all()
        assert np.isfinite(metrics["meta_loss"])
    assert trainer.theta(state)[0] < theta[0]  # away from the cliff


def test_a_run_that_explodes_counts_no_more_than_the_bound():
    """One of every pair loses 1e6; the step of SGD is that of a difference of 0.5."""
    task = parabola().replace(loss=lambda x, batch: 0.5 * x**2 + jnp.where(x < 0.9, 1e6, 0.0))
    windows = {"rollout": 2, "truncation": 2, "population": 2, "sigma": 0.02, "lr": 1e-4}
    moved = {}
    for bound in (0.0, 0.5):
        theta, trainer = make(task=task, clip_difference=bound, **windows)
        state = trainer.init(jax.random.key(0), theta)
        after, metrics = trainer.step(jax.random.key(1), state)
        moved[bound] = metrics["grad_norm"]
        assert trainer.theta(after)[0] < theta[0]
    # A window's loss is the mean of those before its two steps: 0 and 1e6.
    np.testing.assert_allclose(moved[0.5] / moved[0.0], 0.5 / 0.5e6, rtol=1e-4)


def test_a_generation_without_a_finite_loss_leaves_theta():
    task = parabola()
    task = task.replace(loss=lambda x, batch: jnp.nan * x)
    theta, trainer = make(task=task, population=4, optimizer="adam", lr=0.1)
    state = trainer.init(jax.random.key(0), theta)
    for i in range(2):
        state, metrics = trainer.step(jax.random.key(i), state)
    np.testing.assert_array_equal(trainer.theta(state), theta)
    assert metrics["non_finite"] == 4
    np.testing.assert_array_equal(state.phase.left, 0)


def test_training_finds_the_better_schedule():
    theta, trainer = make(optimizer="adam", lr=0.02, population=32, sigma=0.02)
    state, step = trainer.init(jax.random.key(0), theta), jax.jit(trainer.step)
    for i in range(60):
        state, _ = step(jax.random.fold_in(jax.random.key(1), i), state)
    assert mean_loss(trainer.theta(state)) < 0.6 * mean_loss(theta)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"population": 3}, "population must be even"),
        ({"sigma": 0.0}, "sigma"),
        ({"lr": float("nan")}, "lr"),
        ({"clip": -1.0}, "clip"),
        ({"clip_difference": -1.0}, "clip_difference"),
        ({"rollout": 10, "truncation": 4}, "PESConfig.rollout .* multiple"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        PESConfig(**settings)
