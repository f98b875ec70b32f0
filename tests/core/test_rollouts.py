"""The one loop against a Python loop over optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.core.rollouts import mean_loss, unroll, unroll_sampled, windowed
from metaopt.tasks import quadratic

TASK = quadratic(dim=4)


def by_hand(tx, x, batches):
    state, losses, value_and_grad = tx.init(x), [], jax.jit(jax.value_and_grad(TASK.loss))
    update = jax.jit(tx.update)
    for batch in batches:
        value, grad = value_and_grad(x, batch)
        losses.append(value)
        updates, state = update(grad, state, x)
        x = optax.apply_updates(x, updates)
    return x, losses


def test_unroll_is_the_loop_that_users_write():
    tx, x = optax.adam(0.1), TASK.init(jax.random.key(0))
    batches = TASK.sample(jax.random.key(1), (7,))
    expected, losses = by_hand(tx, x, batches)
    params, _, seen = unroll(tx, x, tx.init(x), TASK.loss, batches)
    np.testing.assert_allclose(params, expected, rtol=1e-5)
    np.testing.assert_allclose(seen, losses, rtol=1e-6)


def test_layers_take_the_steps_of_the_loop_that_users_write():
    """Gradients of layers are stored as the layers are: alone, side by side, and differentiated."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (5, 3)), "b": jax.random.normal(keys[1], (3, 2, 2))}
    batches = jax.random.normal(keys[2], (4, 6, 5))

    def loss_fn(params, batch):
        return jnp.mean(jnp.einsum("ij,jkl->ikl", jnp.tanh(batch @ params["a"]), params["b"]) ** 2)

    def by_hand(rate, params):
        tx = optax.adam(rate)
        state = tx.init(params)
        for batch in batches:
            updates, state = tx.update(jax.grad(loss_fn)(params, batch), state)
            params = optax.apply_updates(params, updates)
        return params

    def unrolled(rate, params):
        tx = optax.adam(rate)
        return unroll(tx, params, tx.init(params), loss_fn, batches)[0]

    rates = jnp.array([0.01, 0.1])
    last = lambda run: lambda rate: loss_fn(run(rate, params), batches[0])
    for both in (
        lambda run: jax.jit(jax.vmap(run, (0, None)))(rates, params),
        lambda run: jax.jit(jax.grad(last(run)))(0.1),
        lambda run: jax.jit(jax.hessian(last(run)))(0.1),
    ):
        same = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
        jax.tree.map(same, both(unrolled), both(by_hand))


def test_inner_line_searches_get_optax_extra_args():
    tx, x = optax.lbfgs(), TASK.init(jax.random.key(0))
    params, _, _ = unroll(tx, x, tx.init(x), TASK.loss, jnp.zeros((8, 4)))
    assert TASK.loss(params, jnp.zeros(4)) < 1e-6


def test_unroll_sampled_takes_a_traced_number_of_steps():
    tx, x = optax.sgd(0.3), TASK.init(jax.random.key(0))
    batches = TASK.sample(jax.random.key(1), (9,))
    run = jax.jit(lambda n: unroll_sampled(tx, x, tx.init(x), TASK.loss, lambda t: batches[t], n))
    for n in (3, 9):
        expected, losses = by_hand(tx, x, batches[:n])
        params, _, mean = run(n)
        np.testing.assert_allclose(params, expected, rtol=1e-5)
        np.testing.assert_allclose(mean, np.mean(losses), rtol=1e-5)
    assert run._cache_size() == 1


def test_windowed_returns_the_sum_of_its_steps():
    tx, x = optax.sgd(0.3), TASK.init(jax.random.key(0))
    batches = TASK.sample(jax.random.key(1), (5,))
    guard = windowed(tx)
    updates, _ = guard.update(None, guard.init(x), x, loss_fn=TASK.loss, train_batches=batches)
    np.testing.assert_allclose(x + updates, by_hand(tx, x, batches)[0], rtol=1e-6)


def test_windowed_rejects_per_step_calls():
    tx = windowed(optax.sgd(0.1))
    window = {"loss_fn": TASK.loss, "train_batches": jnp.zeros((2, 4))}
    with pytest.raises(ValueError, match="updates=None"):
        tx.update(jnp.ones(4), tx.init(jnp.ones(4)), jnp.ones(4), **window)
    with pytest.raises(ValueError, match="needs `params`"):
        tx.update(None, tx.init(jnp.ones(4)), **window)


def test_mean_loss_makes_nan_infinite():
    assert mean_loss(TASK.loss, jnp.full(4, jnp.nan), jnp.zeros((2, 4))) == jnp.inf
    np.testing.assert_allclose(
        mean_loss(TASK.loss, jnp.ones(4), jnp.zeros((2, 4))), TASK.loss(jnp.ones(4), jnp.zeros(4))
    )


def test_first_order_stops_what_the_optimizer_sees():
    def final(x, second_order):
        tx = optax.sgd(0.3)
        batches = jnp.zeros((4, 4))
        y, _, _ = unroll(tx, x, tx.init(x), TASK.loss, batches, second_order=second_order)
        return TASK.loss(y, jnp.zeros(4)), y

    x = TASK.init(jax.random.key(0))
    slope, y = jax.grad(final, has_aux=True)(x, False)
    np.testing.assert_array_equal(slope, jax.grad(TASK.loss)(y, jnp.zeros(4)))
    full, _ = jax.grad(final, has_aux=True)(x, True)
    h = jnp.geomspace(0.1, 1.0, 4)  # each step multiplies coordinate i by 1 - 0.3 h_i
    np.testing.assert_allclose(full, slope * (1 - 0.3 * h) ** 4, rtol=1e-5)
