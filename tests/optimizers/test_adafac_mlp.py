"""The adafac MLP against trajectories of the published code, and its properties."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.optimizers import adafac_mlp, theta_from_named

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.zeros(3)}
GRADS = {"w": jnp.sin(jnp.arange(12.0)).reshape(4, 3), "b": jnp.array([0.5, 1.0, -2.0])}


@functools.cache
def run():
    data = golden.load("celo/adafac_small_1")
    tx = adafac_mlp().apply(theta_from_named("adafac_mlp", golden.named_theta(data)))
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("file", ["adafac_small_1", "adafac_small_2"])
def test_reproduces_the_published_code(file):
    data = golden.load(f"celo/{file}")
    theta = theta_from_named("adafac_mlp", golden.named_theta(data))
    state = golden.assert_reproduces(adafac_mlp().apply(theta), data)
    assert int(state.skipped) == 0 and int(state.t) == len(data["grads/p0"])


@pytest.mark.parametrize("where", ["gradient", "params"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, 1e20])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(where, value):
    tx, update = run()
    _, before = update(GRADS, tx.init(PARAMS), PARAMS)
    bad = {"gradient": GRADS, "params": PARAMS}
    bad[where] = {**bad[where], "w": bad[where]["w"].at[2, 1].set(value)}
    updates, after = update(bad["gradient"], before, bad["params"])
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)
    expected = before._replace(t=before.t + 1, skipped=before.skipped + 1)
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    updates, _ = update(GRADS, after, PARAMS)
    assert all(np.all(np.isfinite(u)) and np.any(u) for u in jax.tree.leaves(updates))


def test_the_largest_gradients_that_are_not_skipped_stay_finite():
    tx, update = run()
    grads = jax.tree.map(lambda g: 9e8 * jnp.sign(g), GRADS)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = update(grads, state, PARAMS)
    assert int(state.skipped) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))


def test_init_has_the_published_size():
    theta = adafac_mlp().init(jax.random.key(0), {})
    assert sum(x.size for x in jax.tree.leaves(theta)) == 197


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx, s: tx.update(GRADS, s), "adafac_mlp: update needs `params`"),
        (lambda tx, s: tx.init({"n": jnp.arange(3)}), "adafac_mlp: leaf 'n' has dtype int32"),
        (
            lambda tx, s: adafac_mlp().apply({"w": 1.0}),
            "adafac_mlp: these are not the adafac MLP's",
        ),
    ],
)
def test_misuse_is_explained(call, message):
    tx, _ = run()
    with pytest.raises(ValueError, match=message):
        call(tx, tx.init(PARAMS))


def test_tensors_of_one_shape_are_stepped_as_each_alone():
    tx, update = run()
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(4, 3), (3,), (4, 3), (), (3,), (0,)]
    params = {str(k): jax.random.normal(key, shapes[k]) for k, key in enumerate(keys)}
    grads = jax.tree.map(jnp.sin, params)
    state, alone = tx.init(params), {k: tx.init(p) for k, p in params.items()}
    for _ in range(2):
        updates, state = update(grads, state, params)
        for k in params:
            expected, alone[k] = update(grads[k], alone[k], params[k])
            np.testing.assert_allclose(updates[k], expected, rtol=1e-5, atol=1e-9)
    for k in params:
        for m, expected in zip(state.momenta, alone[k].momenta, strict=True):
            np.testing.assert_allclose(m[k], expected, rtol=1e-6)
        np.testing.assert_allclose(state.v[k], alone[k].v, rtol=1e-6)
        own = state.factored[k], alone[k].factored
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *own)


def test_many_biases_are_one_program():
    def size(num_biases):
        params = {"w": jnp.ones((4, 3))} | {str(k): jnp.ones(5) for k in range(num_biases)}
        tx = adafac_mlp().apply(adafac_mlp().init(jax.random.key(0), params))
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        return len(jaxpr.eqns)

    # What is left for each bias: its parts enter the stack and leave it.
    assert (size(20) - size(2)) / 18 < 0.1 * (size(1) - size(0))
