"""Properties of LGL2O (algorithms 1 and 2), exact where possible."""

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
    drive_plain,
    nan_memory,
    stream_of,
    tiny,
    whole_task,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metaopt import guards
from metaopt.core.rollouts import mean_loss
from metaopt.tasks import quadratic

TASK = quadratic(5, noise=0.3)


@pytest.mark.parametrize("fallback", FALLBACKS)
@pytest.mark.parametrize("value", USELESS)
def test_useless_proposals_leave_exactly_the_fallbacks_trajectory(value, fallback):
    """The run and the fallback's state are those of the fallback alone, bit for bit."""
    guard = guards.lgl2o(ADVERSARIES[value](), FALLBACKS[fallback](), n_t=4, n_c=3)
    start = TASK.init(jax.random.key(0))
    plain = drive_plain(FALLBACKS[fallback](), TASK, start, 3, guard.window)
    for (x, state), (z, z_state) in zip(drive(guard, TASK, start, 3), plain, strict=True):
        assert not state.info.accepted
        np.testing.assert_array_equal(x, z)
        assert_trees_equal(state.memory.fallback, z_state)


def test_nan_proposals_leave_the_hidden_state_at_its_initial_value():
    """This holds although the memory itself stays finite."""
    learned = tiny()
    theta = learned.init(jax.random.key(0), jnp.zeros(5))
    theta["net"]["bias"] = jnp.full(1, jnp.nan)
    tx = learned.apply({**theta, "memory": jnp.full(1, 0.25)})
    guard = guards.lgl2o(tx, optax.sgd(0.1), n_t=3, n_c=2)
    for _, state in drive(guard, TASK, TASK.init(jax.random.key(0)), 3):
        np.testing.assert_array_equal(state.memory.learned, jnp.full(5, 0.25))


def test_the_fallbacks_own_step_is_a_tie_and_never_accepted():
    guard = guards.lgl2o(FALLBACKS["sgd"](), FALLBACKS["sgd"](), n_t=5, n_c=4)
    start = TASK.init(jax.random.key(0))
    plain = drive_plain(FALLBACKS["sgd"](), TASK, start, 4, guard.window)
    for (x, state), (z, _) in zip(drive(guard, TASK, start, 4), plain, strict=True):
        assert not state.info.accepted
        assert state.info.losses[0] == state.info.losses[1]
        np.testing.assert_array_equal(x, z)


def test_a_fallback_that_stands_still_leaves_exactly_the_learned_trajectory():
    task = whole_task()
    learned = lambda: optax.adam(0.05)
    guard = guards.lgl2o(learned(), optax.sgd(0.0), n_t=5, n_c=2)
    start = task.init(jax.random.key(0))
    plain = drive_plain(learned(), task, start, 5, guard.window)
    for (x, state), (y, y_state) in zip(drive(guard, task, start, 5), plain, strict=True):
        assert state.info.accepted
        np.testing.assert_array_equal(x, y)
        assert_trees_equal(state.memory.learned, y_state)


def test_one_full_batch_per_window_is_algorithm_1():
    task, lr = whole_task(), 0.7
    loss = lambda x: task.loss(x, jnp.zeros(5))
    learned = optax.sgd(lambda t: jnp.where(t % 2, 1.4, 0.1))
    guard = guards.lgl2o(learned, optax.sgd(lr), n_t=1, n_c=1)
    start = expected = task.init(jax.random.key(3))
    choices = []
    for step, (x, state) in enumerate(drive(guard, task, start, 8)):
        grad = jax.grad(loss)(expected)
        y, z = expected - (1.4 if step % 2 else 0.1) * grad, expected - lr * grad
        expected = y if loss(y) < loss(z) else z
        choices.append(bool(state.info.accepted))
        np.testing.assert_allclose(x, expected, rtol=2e-6)
    assert set(choices) == {True, False}


@pytest.mark.parametrize("learned", ADVERSARIES)
def test_the_kept_point_has_the_lower_of_both_losses_on_the_windows_batches(learned):
    guard = guards.lgl2o(ADVERSARIES[learned](), FALLBACKS["adam"](), n_t=4, n_c=3)
    start = TASK.init(jax.random.key(0))
    batches = stream_of(TASK, 4 * 7)
    for w, (x, state) in enumerate(drive(guard, TASK, start, 4)):
        validation = cut(batches, 7 * w + 4, 7 * w + 7)
        kept = mean_loss(TASK.loss, x, validation)
        np.testing.assert_allclose(kept, jnp.min(state.info.losses), rtol=1e-5, atol=1e-6)


@settings(max_examples=8, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    adversary=st.sampled_from(sorted(ADVERSARIES)),
    lr=st.floats(0.05, 1.9),
    condition=st.sampled_from([1.0, 5.0, 50.0]),
    largest=st.sampled_from([0.2, 1.0]),
    seed=st.integers(0, 100),
)
def test_the_corrected_linear_rate_holds_at_every_step_for_any_proposals(
    adversary, lr, condition, largest, seed
):
    """E+ <= [1 - 2 mu lr (1 - L lr / 2)] E for 0 < lr < 2 / L, and F(x+) <= F(GD) <= F(x)."""
    lr, mu = lr / largest, largest / condition
    task = whole_task(condition=condition, largest=largest)
    loss = lambda x: float(task.loss(x, jnp.zeros(5)))
    rate = 1 - 2 * mu * lr * (1 - largest * lr / 2)
    guard = guards.lgl2o(ADVERSARIES[adversary](), optax.sgd(lr), n_t=1, n_c=1)
    before = task.init(jax.random.key(seed))
    for x, state in drive(guard, task, before, 6):
        descent = before - lr * jax.grad(task.loss)(before, jnp.zeros(5))
        slack = 1e-6 * loss(before) + 1e-12
        assert loss(x) <= loss(descent) + slack
        assert loss(descent) <= loss(before) + slack
        assert loss(x) <= rate * loss(before) + slack
        assert_finite((x, state.memory.learned, state.memory.fallback))
        before = x


def test_both_candidates_not_finite_keeps_the_start_and_counts_it():
    guard = guards.lgl2o(constant(float("nan")), constant(float("inf")), n_t=2, n_c=2)
    start = TASK.init(jax.random.key(0))
    for w, (x, state) in enumerate(drive(guard, TASK, start, 3), start=1):
        np.testing.assert_array_equal(x, start)
        assert state.info.kept_start == w and state.info.windows == w
        assert state.info.winner == -1 and not state.info.accepted
        assert np.all(np.isposinf(state.info.losses))


def test_infinite_params_with_a_finite_loss_are_rejected():
    loss = lambda x, batch: jnp.sum(jnp.tanh(x)) + 0.0 * batch
    task = quadratic(3).replace(loss=loss, sample=lambda key, shape, split: jnp.zeros(shape))
    guard = guards.lgl2o(constant(-float("inf")), optax.sgd(0.1), n_t=2, n_c=2)
    for x, state in drive(guard, task, jnp.ones(3), 2):
        assert not state.info.accepted
        assert_finite(x)


@pytest.mark.parametrize("on_reject", ["rollback", "advance", "reset"])
@pytest.mark.parametrize("lr", [1e-3, 2.0])
def test_a_memory_that_turns_nan_is_never_kept(on_reject, lr):
    """Neither after a won window (small lr of the fallback) nor after a lost one."""
    guard = guards.lgl2o(nan_memory(), optax.sgd(lr), n_t=1, n_c=1, on_reject=on_reject)
    for _, state in drive(guard, whole_task(), jnp.ones(5), 2):
        np.testing.assert_array_equal(state.memory.learned["memory"], jnp.ones(3))


def test_a_memory_that_starts_infinite_is_left_alone():
    """optax's line searches keep +inf until their first step."""
    learned = optax.chain(optax.sgd(0.5), optax.scale_by_backtracking_linesearch(5))
    guard = guards.lgl2o(learned, optax.sgd(1e-3), n_t=2, n_c=2)
    x = TASK.init(jax.random.key(0))
    for _, state in drive(guard, TASK, x, 2):
        assert state.info.accepted


def test_diagnostics_are_read_from_the_state():
    guard = guards.lgl2o(optax.sgd(0.3), optax.sgd(0.1), n_t=4, n_c=3)
    _, state = drive(guard, TASK, jnp.ones(5), 2)[-1]
    get = lambda key: optax.tree_utils.tree_get(state, key)
    assert get("windows") == 2 and get("n_t") == 4 and get("n_c") == 3
    assert get("gradient_evals") == 2 * 2 * 4 and get("loss_evals") == 2 * 2 * 3
    assert get("losses").shape == (2,) and int(get("wins").sum()) == 2
    assert get("winner") in (0, 1) and get("accepted").dtype == bool and get("kept_start") == 0


def test_vmap_over_seeds_and_theta_under_jit():
    learned = tiny()

    def run(theta, x, batches):
        guard = guards.lgl2o(learned.apply(theta), optax.sgd(0.1), n_t=3, n_c=2)
        return drive(guard, TASK, x, 2, batches=batches)[-1]

    def scanned(theta, x, batches):
        guard = guards.lgl2o(learned.apply(theta), optax.sgd(0.1), n_t=3, n_c=2)
        guard = guards.in_windows(guard)

        def body(carry, batches):
            train, validation = cut(batches, 0, 3), cut(batches, 3, 5)
            updates, state = guard.update(
                None,
                carry[1],
                carry[0],
                loss_fn=TASK.loss,
                train_batches=train,
                eval_batches=validation,
            )
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (x, guard.init(x)), batches.reshape(2, 5, -1))[0]

    keys = jax.random.split(jax.random.key(0), 3)
    thetas = jax.vmap(learned.init, (0, None))(keys, jnp.zeros(5))
    starts, batches = jax.vmap(TASK.init)(keys), jax.vmap(lambda k: TASK.sample(k, (10,)))(keys)
    vmapped, states = jax.jit(jax.vmap(scanned))(thetas, starts, batches)
    for i in range(3):
        single, state = run(jax.tree.map(lambda t, i=i: t[i], thetas), starts[i], batches[i])
        np.testing.assert_allclose(vmapped[i], single, rtol=1e-5, atol=1e-6)
        assert states.info.wins[i].tolist() == state.info.wins.tolist()


def test_the_second_window_does_not_compile_again():
    traces = []

    def loss(x, batch):
        traces.append(None)
        return TASK.loss(x, batch)

    guard = guards.in_windows(guards.lgl2o(optax.adam(0.3), optax.sgd(0.1), n_t=3, n_c=2))
    update = jax.jit(guard.update, static_argnames="loss_fn")
    x, counts = jnp.ones(5), []
    state = guard.init(x)
    for seed in range(3):
        window = dict(train_batches=stream_of(TASK, 3, seed), eval_batches=stream_of(TASK, 2, seed))
        updates, state = update(None, state, x, loss_fn=loss, **window)
        x = optax.apply_updates(x, updates)
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_t": 0}, "n_t must be at least 1"),
        ({"n_c": -1}, "n_c must be at least 0"),
        ({"on_reject": "keep"}, "on_reject must be one of"),
        ({"fallback_on_reject": "reset"}, "fallback_on_reject must be one of"),
        ({"memory": "new"}, "memory must be one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        guards.lgl2o(optax.sgd(0.1), optax.sgd(0.1), **options)


def test_a_loss_that_judges_needs_mini_batches_to_judge_on():
    guard = guards.lgl2o(optax.sgd(0.1), optax.sgd(0.2), n_c=0)
    loss = lambda params: jnp.sum(params**2)
    state = guard.init(jnp.ones(2))
    with pytest.raises(ValueError, match="lgl2o: eval_fn needs validation mini-batches"):
        guard.update(None, state, jnp.ones(2), value_fn=loss, eval_fn=loss)


def test_several_losses_decide_by_their_mean():
    target = jnp.array([1.0, -2.0])
    losses = lambda params: jnp.square(params - target)
    guard = guards.lgl2o(optax.sgd(0.3), optax.sgd(0.1), n_t=1, n_c=1)
    decided = []
    for eval_fn in (losses, lambda params: jnp.mean(losses(params))):
        x, state = jnp.ones(2), guard.init(jnp.ones(2))
        for _ in range(6):
            updates, state = guard.update(
                None, state, x, value_fn=lambda p: jnp.sum(p**2), eval_fn=eval_fn
            )
            x = optax.apply_updates(x, updates)
        decided.append((x, guards.info(state)))
    assert_trees_equal(*decided)
