"""Celo and Celo-Adam against trajectories of the published code, and their properties."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt import optimizers
from metaopt.optimizers import celo, celo_adam, theta_from_named

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.zeros(3)}
GRADS = {"w": jnp.sin(jnp.arange(12.0)).reshape(4, 3), "b": jnp.array([0.0, 1.0, -2.0])}
MAKE = {"celo": celo, "celo_adam": celo_adam}


@functools.cache
def published(name):
    return metaopt.load(name.replace("_", "-")).theta


@functools.cache
def run(name, num_steps=10):
    """One published optimizer, and its compiled update."""
    tx = MAKE[name]().apply(published(name), num_steps=num_steps)
    return tx, jax.jit(tx.update)


@pytest.fixture(params=MAKE)
def name(request):
    return request.param


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    "file", ["celo_small_1", "celo_small_2", "celo_phase1_small", "celo_bank_small"]
)
def test_celo_reproduces_the_published_code(file):
    data = golden.load(f"celo/{file}")
    theta = theta_from_named("celo", golden.named_theta(data))
    lopt = celo(scheduler=int(data["phase"]) == 2)
    state = golden.assert_reproduces(lopt.apply(theta, num_steps=int(data["num_steps"])), data)
    assert state.schedule.hidden.shape == (1, data["lstm_hidden_size"])  # one row for all tensors
    assert int(state.schedule.skipped) == 0


@pytest.mark.parametrize("file", ["published_mlp", "published_conv"])
def test_the_published_weights_give_the_published_trajectories(name, file):
    data = golden.load(f"celo/{name}_{file}")
    tx = MAKE[name]().apply(published(name), num_steps=int(data["num_steps"]))
    golden.assert_reproduces(tx, data)


@pytest.mark.parametrize("where", ["gradient", "loss", "params"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(name, where, value):
    tx, update = run(name)
    if where == "params" and name == "celo_adam":
        pytest.skip("its step does not depend on the params")
    _, before = update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    bad = {"gradient": GRADS, "params": PARAMS, "loss": jnp.float32(1.0)}
    if where == "loss":
        bad["loss"] = jnp.float32(value)
    else:
        bad[where] = {**bad[where], "w": bad[where]["w"].at[2, 1].set(value)}
    updates, after = update(bad["gradient"], before, bad["params"], value=bad["loss"])
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    schedule = before.schedule._replace(t=jnp.int32(2), skipped=jnp.int32(1))
    assert_equal(after, before._replace(schedule=schedule))
    updates, after = update(GRADS, after, PARAMS, value=0.9)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates)) and np.any(updates["w"])
    assert int(after.schedule.skipped) == 1


def test_a_first_step_that_is_not_finite_is_skipped(name):
    tx, update = run(name)
    bad = {**GRADS, "b": jnp.full(3, jnp.nan)}
    updates, state = update(bad, tx.init(PARAMS), PARAMS, value=1.0)
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    first, _ = update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    second, _ = update(GRADS, state._replace(schedule=tx.init(PARAMS).schedule), PARAMS, value=1.0)
    assert_equal(first, second)


def test_past_the_horizon_it_warns_once_and_time_stays(name):
    tx, _ = run(name, num_steps=2)

    @jax.jit
    def whole(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(GRADS, state, params, value=1.0)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=5)[0]

    with pytest.warns(UserWarning, match=rf"{name}: .* past its horizon num_steps=2") as record:
        params, state = jax.block_until_ready(whole(PARAMS))
        jax.effects_barrier()
    assert len(record) == 1
    # At t = 1, the last planned step, and at t = 4 the step from one state is the same.
    update = jax.jit(tx.update)
    at = lambda t: update(
        GRADS, state._replace(schedule=state.schedule._replace(t=t)), params, value=1.0
    )
    assert_equal(at(jnp.int32(1))[0], at(jnp.int32(4))[0])
    assert np.any(at(jnp.int32(0))[0]["w"] != at(jnp.int32(1))[0]["w"])


def test_celo_adam_with_a_dead_scheduler_is_adam():
    """Where the last layer is zero, lambda is 0.1; gradients are large beside 1e-5."""
    theta = published("celo_adam")
    zero = jax.tree.map(jnp.zeros_like, theta["rnn_params"]["step_size"])
    theta = {**theta, "rnn_params": {**theta["rnn_params"], "step_size": zero}}
    tx, adam = celo_adam().apply(theta, num_steps=10), optax.adam(1e-4)
    state, adam_state, update = tx.init(PARAMS), adam.init(PARAMS), jax.jit(tx.update)
    for t in range(4):
        grads = jax.tree.map(lambda g, t=t: jnp.cos(t + g), GRADS)
        actual, state = update(grads, state, value=1.0)  # params are not needed
        expected, adam_state = adam.update(grads, adam_state)
        for k in actual:
            np.testing.assert_allclose(actual[k], expected[k], rtol=2e-4)


def test_absorb_makes_the_memory_the_initial_one(name):
    tx, update = run(name)
    _, state = update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    theta = MAKE[name]().absorb(published(name), state)
    assert_equal(theta["lstm_init_state"]["cell"], state.schedule.cell)
    assert jax.tree.structure(theta) == jax.tree.structure(published(name))


def test_sizes_of_init():
    size = lambda lopt: sum(x.size for x in jax.tree.leaves(lopt.init(jax.random.key(0), {})))
    assert size(celo()) == 37_089 and size(celo_adam()) == 36_865


def test_tensors_without_elements_are_ignored(name):
    tx, _ = run(name)
    with_empty = {**PARAMS, "none": jnp.zeros((0, 3))}
    grads = {**GRADS, "none": jnp.zeros((0, 3))}
    update = jax.jit(tx.update)
    actual, _ = update(grads, tx.init(with_empty), with_empty, value=1.0)
    expected, _ = run(name)[1](GRADS, tx.init(PARAMS), PARAMS, value=1.0)
    for k in expected:
        np.testing.assert_allclose(actual[k], expected[k], rtol=1e-5)
    nothing, state = tx.update({}, tx.init({}), {}, value=1.0)
    assert nothing == {} and int(state.schedule.t) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx, s, p: tx.update(p, s, p), "update needs the loss .*`value`.*value=loss"),
        (lambda tx, s, p: tx.update(p, s, p, value=jnp.ones(2)), r"one number, got shape \(2,\)"),
        (lambda tx, s, p: tx.update({"w": p["w"]}, s, p, value=1.0), r"missing \['b'\]"),
        (lambda tx, s, p: tx.init({"n": jnp.arange(3)}), "leaf 'n' has dtype int32"),
    ],
)
def test_misuse_of_an_update_is_explained(name, call, message):
    tx, _ = run(name)
    with pytest.raises(ValueError, match=f"{name}: .*{message}|{name}: {message}"):
        call(tx, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: celo().apply(published("celo")), r"celo: apply needs .* num_steps=\.\.\."),
        (lambda: celo_adam().apply(published("celo_adam"), num_steps=0), "at least 1, got 0"),
        (lambda: celo().apply(published("celo_adam"), num_steps=5), "not Celo's .*missing: ff_mod"),
        (lambda: celo_adam().apply(published("celo"), num_steps=5), "Celo-Adam's .*not known: ff_"),
        (lambda: optimizers.velo().apply(published("celo"), num_steps=5), r"\(18, 64\), not \(30"),
        (lambda: celo(0), "celo: hidden must be at least 1, got 0"),
        (lambda: celo(bank=-1), "celo: bank must be at least 1, got -1"),
        (lambda: celo_adam(2.5), "celo_adam: hidden must be an integer, got 2.5"),
    ],
)
def test_misuse_is_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_celo_needs_params():
    tx, _ = run("celo")
    with pytest.raises(ValueError, match="celo: update needs `params`"):
        tx.update(GRADS, tx.init(PARAMS), value=1.0)
