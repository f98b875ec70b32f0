"""The residual guard: its five sequences, their bounds, and its cost."""

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
    constant,
    stream_of,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metaopt import guards
from metaopt.core.rollouts import step
from metaopt.tasks import quadratic

TASK = quadratic(5, noise=0.3)
SEQUENCES = ("GS", "AA", "EMA", "RT", "RM")


def walk(tx, x, num_steps: int, task=TASK, seed: int = 1):
    """Returns (params, state) after each step, computed op by op."""
    trail = []
    with jax.disable_jit():
        state = tx.init(x)
        for batch in stream_of(task, num_steps, seed):
            x, state, _ = step(tx, x, state, lambda p, batch=batch: task.loss(p, batch))
            trail.append((x, state))
    return trail


def thresholds(sequence: str, alpha: float, num_steps: int, **options):
    """Returns mu_k under a tight adversary, whose residual is just below alpha * mu."""
    loss = lambda x: 0.5 * jnp.sum(x**2)
    mu = []

    def adversary():
        def update(updates, state, params=None):
            return jnp.full(1, alpha * mu[-1] * (1 - 1e-6)) - params, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    x = jnp.ones(1)
    guard = guards.gl2o(adversary(), optax.sgd(1.0), sequence=sequence, alpha=alpha, **options)
    state = guard.init(x)
    mu.append(1.0)
    with jax.disable_jit():
        for _ in range(num_steps):
            updates, state = guard.update(jax.grad(loss)(x), state, x, value_fn=loss)
            x = optax.apply_updates(x, updates)
            assert state.info.accepted
            mu.append(float(state.safeguard.threshold))
    return np.array(mu)


@pytest.mark.parametrize(
    ("sequence", "options", "bound"),
    [
        ("GS", {"factor": 0.9}, lambda n: 0.9),
        ("RT", {}, lambda n: 0.98),
        ("EMA", {"factor": 0.9}, lambda n: 1 - 0.9 * (1 - 0.98)),
        ("AA", {}, lambda n: (n + 0.98) / (n + 1)),
    ],
)
def test_each_threshold_shrinks_by_its_bound_and_a_tight_adversary_attains_it(
    sequence, options, bound
):
    mu = thresholds(sequence, 0.98, 12, **options)
    expected = [bound(n) for n in range(1, 13)]
    np.testing.assert_allclose(mu[1:] / mu[:-1], expected, rtol=1e-5)


def test_recent_maximum_never_grows_and_shrinks_within_m_acceptances():
    mu = thresholds("RM", 0.9, 12, m=3)
    assert np.all(np.diff(mu) <= 0)
    assert np.all(mu[3:] <= 0.9 * mu[:-3] * (1 + 1e-6))
    np.testing.assert_allclose(mu[3], 0.9 * mu[0], rtol=1e-5)


def test_ema_of_one_recent_term_and_recent_maximum_of_one_are_the_same():
    runs = [
        walk(guards.gl2o(optax.sgd(0.8), optax.sgd(0.3), **options), jnp.ones(5), 8)
        for options in (
            dict(sequence="EMA", factor=1.0),
            dict(sequence="RT"),
            dict(sequence="RM", m=1),
        )
    ]
    assert 0 < int(runs[0][-1][1].info.wins[0]) < 8  # both candidates win at times
    for (x, a), (y, b), (z, c) in zip(*runs, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
        assert a.safeguard.threshold == b.safeguard.threshold == c.safeguard.threshold


def test_ema_with_weight_zero_keeps_the_threshold():
    trail = walk(guards.gl2o(optax.sgd(0.8), optax.sgd(0.3), factor=0.0), jnp.ones(5), 6)
    assert trail[-1][1].info.wins[0] > 0
    assert len({float(state.safeguard.threshold) for _, state in trail}) == 1


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_proposals_that_are_not_finite_leave_exactly_the_fallback(sequence, value):
    guard = guards.gl2o(constant(value), FALLBACKS["sgd"](), sequence=sequence)
    guard_trail = walk(guard, jnp.ones(5), 5)
    plain_trail = walk(FALLBACKS["sgd"](), jnp.ones(5), 5)
    first = guard_trail[0][1].safeguard.threshold
    for (x, state), (z, _) in zip(guard_trail, plain_trail, strict=True):
        np.testing.assert_array_equal(x, z)
        assert state.safeguard.threshold == first and not state.info.accepted


def test_alpha_zero_accepts_nothing():
    guard_trail = walk(guards.gl2o(optax.sgd(0.9), optax.sgd(0.3), alpha=0.0), jnp.ones(5), 5)
    plain_trail = walk(optax.sgd(0.3), jnp.ones(5), 5)
    for (x, state), (z, _) in zip(guard_trail, plain_trail, strict=True):
        np.testing.assert_array_equal(x, z)
        assert not state.info.accepted


@pytest.mark.parametrize("lr", [0.4, 1.0, 1.9])
def test_the_fallbacks_own_step_is_always_accepted_with_alpha_one(lr):
    """On a convex quadratic ||S|| does not grow along an averaged operator."""
    task = quadratic(5, noise=0.0)
    guard = guards.gl2o(optax.sgd(lr), optax.sgd(lr), sequence="RT", alpha=1.0)
    guard_trail = walk(guard, jnp.ones(5), 8, task)
    plain_trail = walk(optax.sgd(lr), jnp.ones(5), 8, task)
    for (x, state), (z, _) in zip(guard_trail, plain_trail, strict=True):
        assert state.info.accepted
        np.testing.assert_array_equal(x, z)


@settings(max_examples=6, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    adversary=st.sampled_from(sorted(ADVERSARIES)),
    sequence=st.sampled_from(SEQUENCES),
    alpha=st.sampled_from([0.5, 0.99, 1.0]),
    seed=st.integers(0, 100),
)
def test_no_accepted_residual_exceeds_the_threshold_and_all_stays_finite(
    adversary, sequence, alpha, seed
):
    guard = guards.gl2o(
        ADVERSARIES[adversary](), optax.sgd(0.3), sequence=sequence, alpha=alpha, m=2
    )
    mu = np.inf
    for x, state in walk(guard, TASK.init(jax.random.key(seed)), 6, seed=seed):
        if state.info.windows > 1 and state.info.accepted:
            assert state.residual <= alpha * mu
        assert state.info.windows == 1 or state.safeguard.threshold <= mu * (1 + 1e-6)
        mu = float(state.safeguard.threshold)
        assert_finite((x, state.learned, state.fallback, mu))


def test_one_more_gradient_per_step_than_the_callers():
    calls = []

    @jax.custom_vjp
    def loss(x):
        return 0.5 * jnp.sum(x**2)

    def backward(x, cotangent):
        calls.append(None)
        return (cotangent * x,)

    loss.defvjp(lambda x: (loss(x), x), backward)
    guard = guards.gl2o(optax.sgd(0.9), optax.sgd(0.3))
    x = jnp.ones(3)
    guard.update(x, guard.init(x), x, value_fn=loss)
    assert len(calls) == 1


@pytest.mark.parametrize("on_reject", ["advance", "rollback"])
def test_memory_after_a_rejected_step(on_reject):
    learned = optax.chain(optax.trace(0.5), optax.scale(100.0))
    guard = guards.gl2o(learned, optax.sgd(0.1), on_reject=on_reject)
    _, state = walk(guard, jnp.ones(5), 1)[0]
    assert not state.info.accepted
    moved = np.any(optax.tree_utils.tree_get(state.learned, "trace") != 0)
    assert moved == (on_reject == "advance")


def test_residual_of_the_gradient_does_not_shrink_with_the_rate():
    """The threshold is the size of the first gradient, whatever the learning rate."""
    sizes = {}
    for residual in ("step", "gradient"):
        guard = guards.gl2o(constant(jnp.nan), optax.sgd(0.01), residual=residual)
        sizes[residual] = walk(guard, jnp.ones(5), 1)[0][1].safeguard.threshold
    np.testing.assert_allclose(sizes["step"], 0.01 * sizes["gradient"], rtol=1e-6)


def test_a_fresh_batch_may_measure_the_residual():
    guard = guards.gl2o(optax.sgd(0.9), optax.sgd(0.3))
    x = jnp.ones(3)
    flat = lambda p: 0.0 * jnp.sum(p)
    _, state = guard.update(
        x, guard.init(x), x, value_fn=lambda p: 0.5 * jnp.sum(p**2), residual_value_fn=flat
    )
    assert state.residual == 0.0 and state.info.accepted


def test_neither_step_finite_keeps_the_start_and_counts_it():
    guard = guards.gl2o(constant(jnp.nan), constant(jnp.inf))
    for k, (x, state) in enumerate(walk(guard, jnp.ones(5), 2), start=1):
        np.testing.assert_array_equal(x, jnp.ones(5))
        assert state.info.kept_start == k and state.info.winner == -1


def test_runs_in_windows_and_as_a_stream():
    guard = guards.gl2o(optax.sgd(0.9), optax.adam(0.1))
    window_form = guards.in_windows(guard)
    updates, state = window_form.update(
        None,
        window_form.init(jnp.ones(5)),
        jnp.ones(5),
        loss_fn=TASK.loss,
        train_batches=stream_of(TASK, 4),
    )
    x, expected = walk(guard, jnp.ones(5), 4)[-1]
    np.testing.assert_allclose(1.0 + updates, x, rtol=1e-5, atol=1e-6)
    get = lambda key: optax.tree_utils.tree_get(state, key)
    assert get("windows") == 4 and get("gradient_evals") == 8
    np.testing.assert_allclose(get("threshold"), expected.safeguard.threshold, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence": "SMA"}, "sequence must be one of GS, AA, EMA, RT, RM, got 'SMA'"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"factor": -0.1}, r"factor must be in \[0, 1\]"),
        ({"m": 0}, "m must be at least 1"),
        ({"residual": "loss"}, "residual must be one of"),
        ({"on_reject": "reset"}, "on_reject must be one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        guards.gl2o(optax.sgd(0.1), optax.sgd(0.1), **options)


def test_value_fn_is_needed():
    guard = guards.gl2o(optax.sgd(0.1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="gl2o: update is missing value_fn"):
        guard.update(jnp.ones(3), guard.init(jnp.ones(3)), jnp.ones(3))


def test_a_gradient_that_is_not_given_is_computed():
    guard = guards.gl2o(optax.sgd(0.9), optax.adam(0.1))
    x = y = jnp.ones(5)
    state = other = guard.init(x)
    for batch in stream_of(TASK, 3):
        value_fn = lambda p, batch=batch: TASK.loss(p, batch)
        updates, state = guard.update(None, state, x, value_fn=value_fn)
        x = optax.apply_updates(x, updates)
        updates, other = guard.update(jax.grad(value_fn)(y), other, y, value_fn=value_fn)
        y = optax.apply_updates(y, updates)
        np.testing.assert_array_equal(x, y)
        assert_trees_equal(state, other)
