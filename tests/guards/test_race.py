"""The race: the fallback's own run is untouched, and the kept point is never worse than it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import (
    ADVERSARIES,
    FALLBACKS,
    USELESS,
    assert_finite,
    assert_trees_equal,
    constant,
    cut,
    drive,
    stream_of,
    whole_task,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metaopt import guards
from metaopt.core.rollouts import mean_loss, unroll
from metaopt.datasets import digits
from metaopt.optimizers import lstm
from metaopt.tasks import classification, quadratic
from metaopt.tasks.networks import MLP

TASK = quadratic(5, noise=0.3)


def plain_run(tx, x, num_windows: int, window: tuple[int, int]):
    """Returns the run without a guard: one loop over the training mini-batches, no windows."""
    n_t, size = window[0], sum(window)
    batches = stream_of(TASK, num_windows * size)
    train = batches.reshape(num_windows, size, -1)[:, :n_t].reshape(num_windows * n_t, -1)
    with jax.disable_jit():
        return unroll(tx, x, tx.init(x), TASK.loss, train)[:2]


@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("learned", ADVERSARIES)
def test_the_fallbacks_run_is_bit_for_bit_the_run_without_a_guard(learned, fallback):
    guard = guards.race(ADVERSARIES[learned](), FALLBACKS[fallback](), n_t=4, n_c=3)
    start = TASK.init(jax.random.key(0))
    _, state = drive(guard, TASK, start, 3)[-1]
    z, z_state = plain_run(FALLBACKS[fallback](), start, 3, guard.window)
    np.testing.assert_array_equal(state.points[0], z)
    assert_trees_equal(state.fallbacks[0], z_state)


@pytest.mark.parametrize("value", USELESS)
def test_useless_proposals_keep_the_fallbacks_run(value):
    guard = guards.race(ADVERSARIES[value](), optax.adam(0.1), n_t=4, n_c=3)
    for x, state in drive(guard, TASK, jnp.ones(5), 4):
        assert state.info.winner == 1 and not state.info.accepted
        np.testing.assert_allclose(
            x, state.points[0], rtol=1e-6, atol=1e-7
        )  # x is a sum with a delta


@settings(max_examples=6, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    learned=st.sampled_from(sorted(ADVERSARIES)),
    others=st.lists(st.sampled_from(sorted(FALLBACKS)), min_size=1, max_size=2),
    on_reject=st.sampled_from(["advance", "rollback", "reset"]),
    jumps=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_kept_point_is_never_worse_than_any_fallbacks_own_run(
    learned, others, on_reject, jumps, seed
):
    """The theorem, on the validation batches of the window, at every decision."""
    fallbacks = [FALLBACKS[name]() for name in others]
    guard = guards.race(
        ADVERSARIES[learned](), *fallbacks, n_t=3, n_c=2, on_reject=on_reject, jumps=jumps
    )
    start = TASK.init(jax.random.key(seed))
    batches = stream_of(TASK, 4 * 5, seed)
    for w, (x, state) in enumerate(drive(guard, TASK, start, 4, batches=batches)):
        validation = cut(batches, 5 * w + 3, 5 * w + 5)
        kept = float(mean_loss(TASK.loss, x, validation))
        for z in state.points:
            fallback_loss = float(mean_loss(TASK.loss, z, validation))
            assert kept <= fallback_loss + 1e-5 * abs(fallback_loss) + 1e-6
        assert_finite((x, state.learned, state.points, state.fallbacks))


@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    learned=st.sampled_from(sorted(ADVERSARIES)),
    lr=st.floats(0.05, 1.9),
    condition=st.sampled_from([1.0, 5.0, 50.0]),
    jumps=st.booleans(),
)
def test_the_corrected_rate_of_the_fallback_holds_from_the_start_for_any_proposals(
    learned, lr, condition, jumps
):
    """E_k <= [1 - 2 mu lr (1 - lr / 2)]^k E_0 with L = 1, the rate of the fallback's own run."""
    task = whole_task(condition=condition)
    rate = 1 - 2 / condition * lr * (1 - lr / 2)
    guard = guards.race(ADVERSARIES[learned](), optax.sgd(lr), n_t=1, n_c=1, jumps=jumps)
    start = task.init(jax.random.key(0))
    energy = lambda x: float(task.loss(x, jnp.zeros(5)))
    for k, (x, state) in enumerate(drive(guard, task, start, 6), start=1):
        assert energy(x) <= rate**k * energy(start) * (1 + 1e-5) + 1e-12
        assert_finite((x, state.learned, state.points))


def test_a_learned_optimizer_that_wins_runs_as_if_alone():
    guard = guards.race(optax.adam(0.1), optax.sgd(0.0), n_t=4, n_c=3)
    x, state = drive(guard, TASK, jnp.full(5, 3.0), 4)[-1]
    assert state.info.wins.tolist() == [4, 0]
    y, y_state = plain_run(optax.adam(0.1), jnp.full(5, 3.0), 4, guard.window)
    np.testing.assert_allclose(x, y, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.learned, y_state)


def test_ties_go_to_a_fallback():
    guard = guards.race(FALLBACKS["adam"](), FALLBACKS["adam"](), n_t=3, n_c=2)
    for _, state in drive(guard, TASK, jnp.ones(5), 2):
        assert state.info.winner == 1


def test_three_runners_take_turns():
    """The first fallback is fast, then explodes; the second is slow and stable."""
    wild = optax.sgd(lambda t: jnp.where(t < 6, 0.5, 30.0))
    guard = guards.race(constant(float("nan")), wild, optax.sgd(0.1), n_t=3, n_c=2)
    winners = [int(s.info.winner) for _, s in drive(guard, TASK, jnp.full(5, 3.0), 5)]
    assert winners == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("on_reject", ["advance", "rollback", "reset"])
def test_memory_after_a_lost_window(on_reject):
    learned = optax.sgd(lambda t: jnp.where(t < 3, 0.2, -5.0), momentum=0.5)
    guard = guards.race(learned, optax.sgd(0.01), n_t=3, n_c=2, on_reject=on_reject)
    (_, won), (_, lost) = drive(guard, TASK, jnp.full(5, 3.0), 2)
    assert won.info.accepted and not lost.info.accepted
    assert optax.tree_utils.tree_get(lost.learned, "count") == 6
    trace = lambda state: np.asarray(optax.tree_utils.tree_get(state.learned, "trace"))
    assert np.array_equal(trace(lost), trace(won)) == (on_reject == "rollback")
    assert np.array_equal(trace(lost), np.zeros(5)) == (on_reject == "reset")


def test_a_fallback_that_diverges_does_not_take_the_kept_point_with_it():
    guard = guards.race(optax.sgd(0.1), constant(float("inf")), n_t=2, n_c=2)
    for x, state in drive(guard, TASK, jnp.ones(5), 3):
        assert state.info.winner == 0
        assert_finite((x, state.learned))


def test_no_finite_candidate_keeps_the_start_and_counts_it():
    guard = guards.race(constant(float("nan")), constant(float("inf")), n_t=2, n_c=2)
    for w, (x, state) in enumerate(drive(guard, TASK, jnp.ones(5), 3), start=1):
        np.testing.assert_array_equal(x, jnp.ones(5))
        assert state.info.kept_start == w and state.info.winner == -1


def test_diagnostics_count_every_runner():
    guard = guards.race(optax.sgd(0.3), optax.sgd(0.1), optax.adam(0.1), n_t=4, n_c=3)
    _, state = drive(guard, TASK, jnp.ones(5), 2)[-1]
    get = lambda key: optax.tree_utils.tree_get(state, key)
    assert get("windows") == 2 and get("losses").shape == (3,) and get("wins").sum() == 2
    assert get("gradient_evals") == 2 * 3 * 4 and get("loss_evals") == 2 * 3 * 3


def test_jumping_runs_go_on_from_the_kept_point_and_leave_the_plain_runs_alone():
    """The learned optimizer leads at first, then is useless; the jumping run keeps its lead."""
    learned = optax.sgd(lambda t: jnp.where(t < 6, 0.5, jnp.nan))
    fallback = optax.sgd(0.05, momentum=0.5)
    guard = guards.race(learned, fallback, n_t=3, n_c=2, jumps=True)
    start = jnp.full(5, 4.0)
    trail = drive(guard, TASK, start, 5)
    assert [int(state.info.winner) for _, state in trail] == [0, 0, 2, 2, 2]
    _, state = trail[-1]
    z, z_state = plain_run(fallback, start, 5, guard.window)
    np.testing.assert_array_equal(state.points[0], z)
    assert_trees_equal(state.fallbacks[0], z_state)
    assert state.info.gradient_evals == 5 * 3 * 3
    # The jump after two windows is the last one before the fifth.
    batches = stream_of(TASK, 25).reshape(5, 5, -1)[2:, :3].reshape(9, -1)
    jumper_state = trail[1][1].fallbacks[1]
    with jax.disable_jit():
        j, _, _ = unroll(fallback, trail[1][0], jumper_state, TASK.loss, batches[:6])
    np.testing.assert_array_equal(trail[3][1].points[1], j)


def test_params_and_state_may_be_donated():
    """At the start all runs are at one point, but in buffers of their own."""
    guard = guards.race(optax.sgd(0.3), optax.sgd(0.1), n_t=2, n_c=2)
    x = jnp.ones(5)
    state = guard.init(x)
    batches = stream_of(TASK, 2)

    def window(x, state):
        updates, state = guard.update(
            None, state, x, loss_fn=TASK.loss, train_batches=batches, eval_batches=batches
        )
        return optax.apply_updates(x, updates), state

    jax.jit(window, donate_argnums=(0, 1))(x, state)


def test_errors():
    with pytest.raises(ValueError, match="at least one fallback"):
        guards.race(optax.sgd(0.1))
    with pytest.raises(ValueError, match="on_reject must be"):
        guards.race(optax.sgd(0.1), optax.sgd(0.1), on_reject="carry")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_t must be at least 1, got 0"):
        guards.race(optax.sgd(0.1), optax.sgd(0.1), n_t=0)


def test_an_lstm_on_a_network_as_a_compiled_stream():
    """Params in a tree, real data: the fallback's run is that of the fallback alone."""
    task = classification(MLP((4, 10)), digits(), batch_size=16)
    x = task.init(jax.random.key(0))
    family = lstm(2)
    theta = family.init(jax.random.key(1), x)
    guard = guards.race(family.apply(theta), optax.sgd(0.1, momentum=0.9), n_t=3, n_c=2)
    tx, batches = guards.streaming(guard), task.sample(jax.random.key(2), (10,))

    @jax.jit
    def run(x):
        return unroll(tx, x, tx.init(x), task.loss, batches)[:2]

    kept, state = run(x)
    plain = optax.sgd(0.1, momentum=0.9)
    train = jax.tree.map(lambda b: jnp.concatenate([b[:3], b[5:8]]), batches)
    z, _, _ = jax.jit(lambda x: unroll(plain, x, plain.init(x), task.loss, train))(x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, state.guard.points[0], z)
    validation = jax.tree.map(lambda b: b[8:], batches)
    assert mean_loss(task.loss, kept, validation) <= mean_loss(task.loss, z, validation) + 1e-5
