"""Properties of the coordinate-wise LSTM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.optimizers import lstm
from metaopt.optimizers.features import log_sign

PARAMS = {
    "scalar": jnp.float32(0.5),
    "vector": jnp.arange(3.0),
    "image": jnp.ones((2, 1, 3, 2)),
    "half": jnp.ones((4,), jnp.bfloat16),
}


@functools.cache
def made(**kwargs):
    lopt = lstm(**kwargs)
    return lopt, jax.jit(lopt.init)(jax.random.key(0), PARAMS)


def setup(**kwargs):
    lopt, theta = made(**kwargs)
    return lopt, jax.tree.map(lambda leaf: leaf, theta)  # a test may change its copy


@functools.cache
def stepper(lopt):
    """``(theta, gradients, state, params) -> updates, state``, compiled."""
    return jax.jit(
        lambda theta, grads, state, params: lopt.apply(theta).update(grads, state, params)
    )


def run(lopt, theta, params, grads):
    state, outs, step = lopt.apply(theta).init(params), [], stepper(lopt)
    for grad in grads:
        updates, state = step(theta, grad, state, params)
        outs.append(updates)
    return outs, state


def normal_like(key, tree):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    normals = [
        jax.random.normal(k, x.shape).astype(x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, normals)


def test_number_of_parameters_is_that_of_the_paper():
    _, theta = setup()
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(theta["net"]) == 5141
    assert size(theta["memory"]) == 80


def test_zero_readout_moves_nothing():
    lopt, theta = setup()
    theta["net"]["readout"] = jax.tree.map(jnp.zeros_like, theta["net"]["readout"])
    outs, _ = run(lopt, theta, PARAMS, [normal_like(jax.random.key(i), PARAMS) for i in range(5)])
    for leaf in jax.tree.leaves(outs):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


def test_leaves_keep_shape_and_dtype():
    lopt, theta = setup()
    (out,), _ = run(lopt, theta, PARAMS, [normal_like(jax.random.key(1), PARAMS)])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(
        lambda x: (x.shape, x.dtype), PARAMS
    )


def test_commutes_with_permutations_of_coordinates():
    lopt, theta = setup()
    grads = jax.random.normal(jax.random.key(2), (6, 40))
    order = jax.random.permutation(jax.random.key(3), 40)
    plain, _ = run(lopt, theta, grads[0], grads)
    permuted, _ = run(lopt, theta, grads[0], grads[:, order])
    for a, b in zip(plain, permuted, strict=True):
        np.testing.assert_array_max_ulp(a[order], b, maxulp=2)


def test_replicated_coordinate_moves_like_a_single_one():
    lopt, theta = setup()
    grads = jax.random.normal(jax.random.key(2), (6, 1))
    single, _ = run(lopt, theta, grads[0], grads)
    many, _ = run(lopt, theta, jnp.zeros(16), jnp.repeat(grads, 16, axis=1))
    for a, b in zip(single, many, strict=True):
        np.testing.assert_allclose(np.repeat(a, 16), b, rtol=1e-6)


def test_equals_a_numpy_lstm_with_gates_i_f_g_o():
    lopt, theta = setup(hidden=5, p=4.0, scale=0.3)
    grads = np.asarray(jax.random.normal(jax.random.key(4), (7, 3)), np.float64)
    net = jax.tree.map(lambda x: np.asarray(x, np.float64), theta["net"])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    memory = [(np.zeros((3, 5)), np.zeros((3, 5))) for _ in range(2)]
    outs, _ = run(lopt, theta, jnp.zeros(3), jnp.asarray(grads, jnp.float32))
    for grad, out in zip(grads, outs, strict=True):
        x = np.asarray(log_sign(jnp.asarray(grad), 4.0), np.float64)
        for layer in range(2):
            cell, (c, h) = net[f"lstm_{layer}"], memory[layer]
            gate = {
                g: x @ cell[f"i{g}"]["kernel"] + h @ cell[f"h{g}"]["kernel"] + cell[f"h{g}"]["bias"]
                for g in "ifgo"
            }
            c = sigmoid(gate["f"]) * c + sigmoid(gate["i"]) * np.tanh(gate["g"])
            x = h = sigmoid(gate["o"]) * np.tanh(c)
            memory[layer] = (c, h)
        step = 0.3 * (x @ net["readout"]["kernel"] + net["readout"]["bias"])[:, 0]
        np.testing.assert_allclose(out, step, rtol=2e-4, atol=1e-6)


def test_absorb_writes_the_mean_memory_and_leaves_the_network():
    lopt, theta = setup()
    grads = jax.random.normal(jax.random.key(2), (6, 8))
    _, state = run(lopt, theta, grads[0], grads)
    absorbed = lopt.absorb(theta, state)
    for (c, h), (mean_c, mean_h) in zip(state.memory, absorbed["memory"], strict=True):
        np.testing.assert_allclose(mean_c[0], np.mean(c, axis=1), rtol=1e-5)
        np.testing.assert_allclose(mean_h[0], np.mean(h, axis=1), rtol=1e-5)
    assert absorbed["net"] is theta["net"]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_non_finite_gradient_is_skipped_and_counted(bad):
    lopt, theta = setup()
    grads = jax.random.normal(jax.random.key(2), (4, 8))
    _, before = run(lopt, theta, grads[0], grads[:2])
    updates, after = stepper(lopt)(theta, grads[2].at[3].set(bad), before, grads[0])
    np.testing.assert_array_equal(updates, np.zeros(8))
    assert after.skipped == 1
    for a, b in zip(jax.tree.leaves(before.memory), jax.tree.leaves(after.memory), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kwargs", [{"hidden": 0}, {"layers": 0}, {"p": 0.0}])
def test_bad_arguments_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        lstm(**kwargs)


def test_other_depths_and_widths():
    lopt, theta = setup(hidden=3, layers=1)
    assert len(theta["memory"]) == 1
    (out,), _ = run(lopt, theta, PARAMS, [PARAMS])
    assert np.isfinite(out["vector"]).all()
