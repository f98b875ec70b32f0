"""Lengths of runs that go window by window, and mixtures of structures, for TBPTT and PES."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structures import falling, geometric

from metaopt.core.types import LearnedOptimizer, single, transformation
from metaopt.meta import PESConfig, TBPTTConfig, pes, tbptt
from metaopt.meta.windows import WindowsConfig, new_phase
from metaopt.tasks import quadratic

LENGTHS = {"rollout": 50, "truncation": 10, "min_rollout": 10}


def test_log_uniform_lengths_are_multiples_of_the_truncation_with_known_frequencies():
    config = WindowsConfig(lengths="log_uniform", **LENGTHS)
    keys = jax.random.split(jax.random.key(0), 20_000)
    phase = jax.vmap(lambda key: new_phase(config, key, jnp.int32(0)))(keys)
    np.testing.assert_array_equal(phase.length, 10 * phase.left)
    counts = np.bincount(np.asarray(phase.left), minlength=6)
    windows = np.arange(1, 6)
    expected = np.log((windows + 1) / windows) / np.log(6)
    np.testing.assert_allclose(counts[1:] / 20_000, expected, atol=0.012)
    assert counts.sum() == counts[1:6].sum()


def test_a_curriculum_grows_evenly_in_the_logarithm():
    config = WindowsConfig(
        lengths="curriculum", curriculum=100, rollout=160, truncation=10, min_rollout=10
    )
    length = lambda update: int(new_phase(config, jax.random.key(0), jnp.int32(update)).length)
    assert [length(u) for u in (0, 25, 50, 75, 100, 1000)] == [10, 20, 40, 80, 160, 160]


def horizon_seen():
    """An optimizer that sets the params to the number of steps it was told."""

    def apply(theta, *, num_steps=None):
        jump = lambda grads, state, params=None, **extra: (num_steps + theta - params, state)
        return transformation(lambda params: (), jump)

    return LearnedOptimizer(lambda key, params: jnp.float32(0.0), apply)


@pytest.mark.parametrize("lengths", ["log_uniform", "curriculum"])
def test_the_optimizer_is_told_the_length_of_its_run_without_compiling_again(lengths):
    config = TBPTTConfig(
        lengths=lengths, rollout=8, truncation=2, min_rollout=2, curriculum=4, tasks=3, lr=0.0
    )
    trainer = tbptt(horizon_seen(), single(quadratic(dim=2, noise=0.0)), config)
    state, step = trainer.init(jax.random.key(0), jnp.float32(0.0)), jax.jit(trainer.step)
    seen, begun = set(), []
    for i in range(12):
        before = state.phases[0]
        state, metrics = step(jax.random.fold_in(jax.random.key(1), i), state)
        after = state.phases[0]
        fresh = np.asarray(before.left) == 0
        np.testing.assert_array_equal(state.runs[0].params[:, 0], after.length)
        windows = np.asarray(after.length) // 2
        if fresh.all():  # they end one after another
            windows = windows - np.arange(3) * windows // 3
        expected = np.where(fresh, windows - 1, np.asarray(before.left) - 1)
        np.testing.assert_array_equal(after.left, expected)
        np.testing.assert_allclose(metrics["num_steps"], np.mean(after.length))
        seen |= set(np.asarray(after.length).tolist())
        begun += [int(n) for n in np.asarray(after.length)[fresh]]
    assert step._cache_size() == 1
    if lengths == "curriculum":
        assert begun == sorted(begun) and (begun[0], begun[-1]) == (2, 8)
    else:
        assert seen > {2} and seen <= {2, 4, 6, 8}


def powers(theta, steps):
    """``mean of theta^t, t < steps``, and its derivative."""
    t = np.arange(steps)
    return np.mean(theta**t), np.mean(t * theta ** np.maximum(t - 1.0, 0.0))


@pytest.mark.parametrize("normalised", [False, True])
def test_back_propagation_through_a_mixture_of_structures(normalised):
    (lopt, theta), families = geometric(), [falling(4.0, 3), falling(32.0, 5)]
    config = TBPTTConfig(rollout=3, truncation=3, tasks=2, normalised=normalised)
    trainer = tbptt(lopt, families, config)
    state = trainer.init(jax.random.key(0), theta)
    _, metrics = jax.jit(trainer.step)(jax.random.key(0), state)
    scale = 1.0 if normalised else (4.0 + 32.0) / 2
    value, slope = powers(0.5, 4)  # the loss after the last update counts too
    np.testing.assert_allclose(metrics["meta_loss"], scale * value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], scale * slope, rtol=1e-5)
    assert metrics["inner_steps"] == 2 * 2 * 3


@pytest.mark.parametrize("normalised", [False, True])
def test_persistent_strategies_on_a_mixture_of_structures(normalised):
    (lopt, theta), families = geometric(), [falling(4.0, 3), falling(32.0, 5)]
    config = PESConfig(
        rollout=6, truncation=3, population=2, tasks=2, sigma=1e-5, normalised=normalised
    )
    trainer = pes(lopt, families, config)
    state, step = trainer.init(jax.random.key(0), theta), jax.jit(trainer.step)
    scale = 1.0 if normalised else (4.0 + 32.0) / 2
    # The only pair's first run is cut to one window; then come the two windows of a whole run.
    for i, before in enumerate([1.0, 1.0, 0.5**3]):
        state, metrics = step(jax.random.fold_in(jax.random.key(0), i), state)
        state = state._replace(strategy=state.strategy.replace(mean=jnp.full(1, theta)))
        expected = scale * before * powers(0.5, 3)[0]
        np.testing.assert_allclose(metrics["meta_loss"], expected, rtol=1e-3)
    assert metrics["inner_steps"] == 2 * 2 * 2 * 3


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"lengths": "log_uniform", "min_rollout": 15}, "min_rollout .* multiple"),
        ({"lengths": "curriculum", "min_rollout": 200}, "min_rollout .* above"),
        ({"curriculum": 0}, "curriculum"),
        ({"truncation": 0}, "WindowsConfig.truncation"),
    ],
)
def test_bad_settings_are_named(settings, name):
    with pytest.raises(ValueError, match=name):
        WindowsConfig(**settings)
