"""Exact properties of SMG and AMG, some of them on full batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import (
    assert_finite,
    assert_trees_equal,
    drive,
    drive_stream,
    stream_of,
    tiny,
    whole_task,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metaopt import guards
from metaopt.core.rollouts import mean_loss, unroll, windowed
from metaopt.core.types import LearnedOptimizer
from metaopt.optimizers import sgd
from metaopt.tasks import quadratic

FAMILY = tiny()
WHOLE = whole_task()
NOISY = quadratic(5, noise=0.3)
START = WHOLE.init(jax.random.key(0))
GUARDS = {"smg": guards.smg, "amg": guards.amg}


def theta_of(seed: int = 0, *, readout: float = 1.0, bias: float = 0.0):
    theta = FAMILY.init(jax.random.key(seed), START)
    net = theta["net"]
    return {**theta, "net": {**net, "rate": readout * net["rate"], "bias": net["bias"] + bias}}


def loss_of(task):
    return lambda x: task.loss(x, jnp.zeros(5))


def loss_scaled() -> LearnedOptimizer:
    """Steps of the size of the loss, as L3RS and VeLO see it too."""

    def apply(theta, *, num_steps=None):
        del num_steps

        def update(updates, state, params=None, *, value, **extra):
            del params, extra
            rate = theta["rate"] * jnp.tanh(value) + theta["bias"]
            return optax.tree.scale(-rate, updates), state + 1

        return optax.GradientTransformationExtraArgs(lambda p: theta["memory"], update)

    def init(key, params):
        del key, params
        return {"rate": jnp.array(0.2), "bias": jnp.array(0.01), "memory": jnp.array(0.0)}

    return LearnedOptimizer(init, apply, lambda theta, state: {**theta, "memory": state})


def by_hand(kind, family, x, theta, batches, n_t: int, lr_params: float, lr_theta: float, fixed):
    """One window of algorithm 1 (smg) or 2 (amg), written anew: plain JAX and Python loops.

    `fixed` is `jax.lax.stop_gradient` for the first-order gradient. Returns params, theta and the
    losses of the candidates.
    """
    first, middle, second = batches[:n_t], batches[n_t], batches[n_t + 1 : 2 * n_t + 1]
    held_out = batches[2 * n_t + 1 :]

    def go(x, theta, batches):
        tx = optax.with_extra_args_support(family.apply(theta))
        memory = tx.init(x)
        for batch in batches:
            value, grad = fixed(jax.value_and_grad(NOISY.loss)(x, batch))
            updates, memory = tx.update(grad, memory, x, value=value)
            x = x + updates
        return x, family.absorb(theta, memory)

    def end_loss(x, theta):
        return NOISY.loss(go(x, theta, first)[0], middle)

    value, (grad_x, grad_theta) = jax.value_and_grad(end_loss, (0, 1))(x, theta)
    learned = go(x, theta, first)
    descend = lambda p, g, lr: jax.tree.map(lambda p, g: p - lr * g, p, g)
    fallback = (descend(x, grad_x, lr_params), descend(theta, grad_theta, lr_theta))
    if kind == "amg" and NOISY.loss(x, middle) <= value:
        fallback = (descend(x, jax.grad(NOISY.loss)(x, middle), lr_params), theta)
    judge = lambda point: float(np.mean([NOISY.loss(point, batch) for batch in held_out]))
    if kind == "smg":
        pairs = [learned, fallback]
        losses = [judge(go(*pair, second)[0]) for pair in pairs]
        return *pairs[int(losses[0] > losses[1])], losses
    pairs = [learned, fallback, go(*fallback, second), (x, theta)]
    losses = [judge(pair[0]) for pair in pairs]
    return *pairs[int(np.argmin(losses))], losses


@pytest.mark.parametrize("kind", GUARDS)
@pytest.mark.parametrize("family", [FAMILY, loss_scaled()], ids=["recurrent", "loss_scaled"])
@pytest.mark.parametrize("in_a_stream", [False, True])
def test_each_window_is_the_papers_algorithm_written_anew(kind, family, in_a_stream):
    """The record that is replayed gives the gradient through the unroll, in x and theta."""
    n_t, n_c, num_windows = 3, 2, 3
    theta = family.init(jax.random.key(10), START)
    options = dict(n_t=n_t, lr_params=0.5, lr_theta=0.3)
    guard = GUARDS[kind](family, theta, n_c=n_c, **options)
    size = sum(guard.window)
    batches = stream_of(NOISY, num_windows * size)
    trail = (drive_stream if in_a_stream else drive)(guard, NOISY, START, num_windows)
    x, winners = START, []
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for w, (after, state) in enumerate(trail):
        window = batches[w * size : (w + 1) * size]
        run = lambda fixed, x=x, theta=theta, window=window: by_hand(
            kind, family, x, theta, window, fixed=fixed, **options
        )
        x, theta, losses = run(jax.lax.stop_gradient)
        close(after, x)
        jax.tree.map(close, state.memory.theta, theta)
        close(state.info.losses, losses)
        winners.append(int(state.info.winner))
        if winners[-1] == 1 and not state.memory.used_gradient:  # second order is another gradient
            assert not np.allclose(run(lambda seen: seen)[0], x, rtol=1e-3)
    assert 1 in winners or kind == "amg"


def gradient_descent(lr: float, num_steps: int):
    """Returns the points of `windowed(sgd)` with one full batch per window, op by op."""
    plain, x, trail = windowed(optax.sgd(lr)), START, []
    with jax.disable_jit():
        state = plain.init(x)
        for _ in range(num_steps):
            updates, state = plain.update(
                None, state, x, loss_fn=WHOLE.loss, train_batches=jnp.zeros((1, 5))
            )
            x = optax.apply_updates(x, updates)
            trail.append(x)
    return trail


@pytest.mark.parametrize("kind", GUARDS)
def test_a_silent_optimizer_leaves_exactly_gradient_descent(kind):
    guard = GUARDS[kind](FAMILY, theta_of(readout=0.0), n_t=3, n_c=2, lr_params=0.7, lr_theta=0.0)
    for (x, state), z in zip(drive(guard, WHOLE, START, 4), gradient_descent(0.7, 4), strict=True):
        np.testing.assert_array_equal(x, z)
        assert state.info.winner == 1


@pytest.mark.parametrize("kind", GUARDS)
def test_no_learned_steps_leave_gradient_descent(kind):
    """T = 0. A loop of no steps cannot run op by op, so this holds to rounding."""
    guard = GUARDS[kind](FAMILY, theta_of(), n_t=0, n_c=2, lr_params=0.7, lr_theta=0.0)
    for go in (drive, drive_stream):
        trail = go(guard, WHOLE, START, 3, op_by_op=False)
        for (x, _), z in zip(trail, gradient_descent(0.7, 3), strict=True):
            np.testing.assert_allclose(x, z, rtol=1e-6)


def test_first_order_gradient_in_params_is_the_gradient_at_the_end_of_the_unroll():
    """The fallback of SMG is x - lr grad l(x_T), bit for bit."""
    guard = guards.smg(FAMILY, theta_of(bias=5.0), n_t=3, n_c=2, lr_params=1.0, lr_theta=0.0)
    ((x, state),) = drive(guard, WHOLE, START, 1)
    assert state.info.winner == 1
    with jax.disable_jit():
        tx = FAMILY.apply(theta_of(bias=5.0))
        end, _, _ = unroll(tx, START, tx.init(START), WHOLE.loss, jnp.zeros((3, 5)))
        expected = START - jax.grad(loss_of(WHOLE))(end)
        np.testing.assert_array_equal(x, START + (expected - START))


@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    readout=st.sampled_from([0.0, 1.0, 30.0, float("nan"), 1e30]),
    lr=st.floats(0.1, 3.0),
    seed=st.integers(0, 50),
)
def test_amg_is_monotone_whatever_theta(readout, lr, seed):
    """Where the gradient branch was used, it is also no worse than that gradient step."""
    guard = guards.amg(FAMILY, theta_of(seed, readout=readout), n_t=3, n_c=2, lr_params=lr)
    loss, x = loss_of(WHOLE), START
    for after, state in drive(guard, WHOLE, x, 3):
        slack = 1e-6 * abs(loss(x))
        assert loss(after) <= loss(x) + slack
        if state.memory.used_gradient:
            assert loss(after) <= loss(x - lr * jax.grad(loss)(x)) + slack
        assert_finite(after)
        if np.isfinite(readout):
            assert_finite(state.memory.theta)
        x = after


@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    kind=st.sampled_from(sorted(GUARDS)),
    readout=st.sampled_from([1.0, 30.0, 1e30, float("inf"), float("nan")]),
    lr=st.sampled_from([0.7, 1e30]),
    seed=st.integers(0, 50),
)
def test_params_stay_finite_whatever_theta_and_rate(kind, readout, lr, seed):
    """theta stays finite wherever it was: a pair that breaks it counts as +inf."""
    theta = theta_of(seed, readout=readout)
    guard = GUARDS[kind](FAMILY, theta, n_t=3, n_c=2, lr_params=lr)
    for x, state in drive(guard, NOISY, START, 3, seed=seed):
        assert_finite(x)
        for before, after in zip(
            jax.tree.leaves(theta), jax.tree.leaves(state.memory.theta), strict=True
        ):
            assert np.all(np.isfinite(after) | ~np.isfinite(before))


def test_amg_guard_loss_is_the_lowest_of_its_four_candidates():
    guard = guards.amg(FAMILY, theta_of(), n_t=3, n_c=4, lr_params=0.5)
    batches = stream_of(NOISY, 3 * 11)
    trail = drive(guard, NOISY, START, 3, batches=batches)
    for w, (x, state) in enumerate(trail):
        kept = mean_loss(NOISY.loss, x, batches[11 * w + 7 : 11 * w + 11])
        np.testing.assert_allclose(kept, jnp.min(state.info.losses), rtol=1e-5)
        assert state.info.winner == jnp.argmin(state.info.losses)


def test_amg_gradient_branch_leaves_theta_and_keeping_leaves_both():
    theta = theta_of(bias=5.0)  # diverges: the plain step is the better fallback
    guard = guards.amg(FAMILY, theta, n_t=3, n_c=2, lr_params=0.5)
    ((_, state),) = drive(guard, WHOLE, START, 1)
    assert state.info.winner == 1 and state.memory.used_gradient
    assert_trees_equal(state.memory.theta, theta)
    guard = guards.amg(FAMILY, theta, n_t=3, n_c=2, lr_params=100.0)
    ((x, state),) = drive(guard, WHOLE, START, 1)
    assert state.info.winner == 3 and not state.info.accepted
    assert_trees_equal((x, state.memory.theta), (START, theta))


def test_without_rates_smg_compares_two_unrolls_with_one():
    """The fallback is (x, theta): learned wins iff l(g(g(x))) <= l(g(x))."""
    winners = set()
    for bias in (-3.0, 0.0):
        theta = theta_of(bias=bias)
        guard = guards.smg(FAMILY, theta, n_t=3, n_c=2, lr_params=0.0, lr_theta=0.0)
        ((_, state),) = drive(guard, WHOLE, START, 1)

        def go(x, theta):
            tx = FAMILY.apply(theta)
            x, memory, _ = unroll(tx, x, tx.init(x), WHOLE.loss, jnp.zeros((3, 5)))
            return x, FAMILY.absorb(theta, memory)

        loss = loss_of(WHOLE)
        once = go(START, theta)
        np.testing.assert_allclose(state.info.losses[1], loss(once[0]), rtol=1e-5)
        np.testing.assert_allclose(state.info.losses[0], loss(go(*once)[0]), rtol=1e-5)
        assert (state.info.winner == 0) == (state.info.losses[0] <= state.info.losses[1])
        winners.add(int(state.info.winner))
    assert winners == {0, 1}


def test_accepted_theta_has_its_weights_and_the_mean_memory():
    theta = theta_of(bias=-0.05)
    guard = guards.smg(FAMILY, theta, n_t=3, n_c=2, lr_params=0.0, lr_theta=0.0)
    task = WHOLE.replace(loss=lambda x, batch: jnp.sum(x))  # down is good for every coordinate
    ((_, state),) = drive(guard, task, START, 1)
    assert state.info.accepted
    assert_trees_equal(state.memory.theta["net"], theta["net"])
    with jax.disable_jit():
        tx = FAMILY.apply(theta)
        _, memory, _ = unroll(tx, START, tx.init(START), task.loss, jnp.zeros((3, 5)))
    jax.tree.map(
        lambda mean, rows: np.testing.assert_array_equal(mean, jnp.mean(rows, 0, keepdims=True)),
        state.memory.theta["memory"],
        memory,
    )
    one = jax.tree.map(lambda rows: rows[:1], memory)  # gradients agree: so do memories
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.memory.theta["memory"], one
    )


def test_the_initial_memory_is_a_part_of_theta_that_descends():
    theta = theta_of(bias=5.0)
    guard = guards.smg(FAMILY, theta, n_t=3, n_c=2, lr_params=0.5, lr_theta=0.1)
    ((_, state),) = drive(guard, WHOLE, START, 1)
    assert state.info.winner == 1
    for before, after in zip(
        jax.tree.leaves(theta["memory"]), jax.tree.leaves(state.memory.theta["memory"]), strict=True
    ):
        assert np.any(before != after)


def test_a_theta_full_of_nan():
    """AMG descends; SMG, whose fallback goes through the unroll, has no finite proposal."""
    theta = theta_of(readout=float("nan"))
    guard = guards.amg(FAMILY, theta, n_t=2, n_c=2, lr_params=0.7)
    for (x, _), z in zip(drive(guard, WHOLE, START, 3), gradient_descent(0.7, 3), strict=True):
        np.testing.assert_array_equal(x, z)
    guard = guards.smg(FAMILY, theta, n_t=2, n_c=2, lr_params=0.7)
    x, state = drive(guard, WHOLE, START, 2)[-1]
    np.testing.assert_array_equal(x, START)
    assert state.info.kept_start == 2 and state.info.winner == -1


def test_adapted_theta_is_a_theta():
    guard = guards.amg(FAMILY, theta_of(), n_t=3, n_c=2, lr_params=0.5)
    _, state = drive(guard, NOISY, START, 3)[-1]
    theta = optax.tree_utils.tree_get(state, "theta")
    assert jax.tree.structure(theta) == jax.tree.structure(theta_of())
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        theta,
        theta_of(),
    )
    FAMILY.apply(theta).init(START)


def test_counts():
    for kind, gradients, losses in (("smg", 3 * 3 + 1, 2 * 2), ("amg", 2 * 3 + 1, 4 * 2 + 2)):
        guard = GUARDS[kind](FAMILY, theta_of(), n_t=3, n_c=2)
        _, state = drive(guard, WHOLE, START, 2)[-1]
        assert guard.window == (7, 2)
        assert state.info.gradient_evals == 2 * gradients and state.info.loss_evals == 2 * losses


@pytest.mark.parametrize("kind", GUARDS)
def test_an_optimizer_without_theta_is_only_guarded(kind):
    family = sgd(0.3, tau=None)
    guard = GUARDS[kind](family, {}, n_t=2, n_c=2, lr_params=0.3)
    losses = [float(loss_of(WHOLE)(x)) for x, _ in drive(guard, WHOLE, START, 3)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("kind", GUARDS)
def test_vmap_over_seeds_and_theta_under_jit(kind):
    def run(theta, x, batches):
        guard = guards.in_windows(GUARDS[kind](FAMILY, theta, n_t=2, n_c=2, lr_params=0.5))
        updates, state = guard.update(
            None,
            guard.init(x),
            x,
            loss_fn=NOISY.loss,
            train_batches=batches[:5],
            eval_batches=batches[5:],
        )
        return optax.apply_updates(x, updates), state

    keys = jax.random.split(jax.random.key(0), 3)
    thetas = jax.vmap(FAMILY.init, (0, None))(keys, START)
    starts, batches = jax.vmap(NOISY.init)(keys), jax.vmap(lambda k: NOISY.sample(k, (7,)))(keys)
    vmapped, states = jax.jit(jax.vmap(run))(thetas, starts, batches)
    single, state = jax.jit(run)(jax.tree.map(lambda t: t[1], thetas), starts[1], batches[1])
    np.testing.assert_allclose(vmapped[1], single, rtol=1e-5, atol=1e-6)
    assert states.info.winner[1] == state.info.winner


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(learned=optax.sgd(0.1), theta={}), "smg: learned must be a LearnedOptimizer"),
        (dict(theta={"a": jnp.arange(3)}), "smg: theta: leaf 'a' has dtype int32"),
        (dict(n_t=-1), "n_t must be at least 0, got -1"),
        (dict(n_c=0), "n_c must be at least 1, got 0"),
        (dict(lr_theta=-0.1), "lr_theta must not be negative"),
    ],
)
def test_options_out_of_range(arguments, message):
    arguments = {"learned": FAMILY, "theta": theta_of(), **arguments}
    with pytest.raises(ValueError, match=message):
        guards.smg(**arguments)


@pytest.mark.parametrize("kind", GUARDS)
def test_a_learned_optimizer_cannot_ask_for_value_fn(kind):
    """Mini-batches are gone when the unroll is replayed; the error says so."""

    def apply(theta, *, num_steps=None):
        del num_steps

        def update(updates, state, params=None, *, value_fn, **extra):
            del params, extra, value_fn
            return optax.tree.scale(-theta, updates), state

        return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)

    family = LearnedOptimizer(lambda key, params: jnp.array(0.1), apply)
    guard = GUARDS[kind](family, jnp.array(0.1), n_t=2, n_c=2)
    message = f"{kind}: the learned transformation takes other extra args"
    for go in (drive, drive_stream):
        with pytest.raises(TypeError, match=message):
            go(guard, WHOLE, START, 1)
