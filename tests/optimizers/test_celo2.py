"""Celo2 against trajectories of the published code, and its properties."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt.optimizers import (
    celo2,
    celo2_adamw,
    celo2_labels,
    imitate_muon,
    theta_from_named,
)
from metaopt.optimizers.celo2 import newton_schulz

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.zeros(3)}
GRADS = {"w": jnp.sin(jnp.arange(12.0)).reshape(4, 3), "b": jnp.array([0.5, 1.0, -2.0])}


@functools.cache
def trained():
    return theta_from_named("celo2", golden.named_theta(golden.load("celo/celo2_base_1")))


@functools.cache
def run(make=celo2, **settings):
    tx = make(**settings).apply(trained())
    return tx, jax.jit(tx.update)


def direction(data):
    """The optimizer of a file: the direction, weight decay, the learning rate of each step."""
    theta = theta_from_named("celo2", golden.named_theta(data))
    return optax.chain(
        celo2(bool(data["orthogonalize"])).apply(theta),
        optax.add_decayed_weights(float(data["weight_decay"])),
        optax.scale_by_learning_rate(rates(data["learning_rate"])),
    )


def rates(table):
    table = jnp.atleast_1d(table)  # one rate for all steps: an index beyond the end is the last
    return lambda count: table[count]


@pytest.mark.parametrize(
    "file", ["celo2_base_1", "celo2_base_2", "celo2_orth_1", "celo2base_metatrain_conv"]
)
def test_the_direction_reproduces_the_published_code(file):
    data = golden.load(f"celo/{file}")
    state = golden.assert_reproduces(direction(data), data)
    assert int(state[0].skipped) == 0


@pytest.mark.parametrize("file", ["celo2_deploy_2", "celo2_deploy_conv"])
def test_the_deployed_form_reproduces_the_published_one(file):
    data = golden.load(f"celo/{file}")
    factor = data["adam_learning_rate"] / data["learning_rate"]
    np.testing.assert_allclose(factor, factor[0], rtol=1e-6)
    lopt = celo2_adamw(
        rates(data["learning_rate"]),
        weight_decay=float(data["weight_decay"]),
        adam_factor=float(factor[0]),
    )
    theta = theta_from_named("celo2", golden.named_theta(data))
    assert int(golden.assert_reproduces(lopt.apply(theta), data).skipped) == 0


def test_the_form_of_meta_training_is_a_partition_with_another_adam():
    data = golden.load("celo/celo2_metatrain_conv")

    def init(params):
        return optax.tree.zeros_like(params), optax.tree.zeros_like(params)

    def update(grads, state, params=None):
        mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], grads)
        nu = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, state[1], grads)
        return jax.tree.map(lambda m, v: m / jnp.sqrt(v + 1e-8), mu, nu), (mu, nu)

    uncorrected_adam = optax.chain(
        optax.GradientTransformation(init, update),
        optax.add_decayed_weights(float(data["weight_decay"])),
        optax.scale_by_learning_rate(float(data["mult_1d"] * data["learning_rate"])),
    )
    both = {"celo2": direction(data), "adam": uncorrected_adam}
    golden.assert_reproduces(optax.partition(both, celo2_labels), data)


def test_newton_schulz_maps_singular_values_by_its_polynomial():
    """Against the singular value decomposition in float64, for wide, tall and batched matrices."""
    rng = np.random.default_rng(0)
    for shape in [(3, 5), (6, 4), (2, 3, 4, 4)]:
        u = rng.normal(size=shape).astype(np.float32)
        left, values, right = np.linalg.svd(np.float64(u), full_matrices=False)
        values /= np.sqrt(np.sum(values**2, axis=-1, keepdims=True))
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        expected = (left * values[..., None, :]) @ right
        np.testing.assert_allclose(newton_schulz(jnp.asarray(u)), expected, atol=2e-5)


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_every_matrix_has_root_mean_square_1(orthogonalize):
    tx, update = run(orthogonalize=orthogonalize)
    params = {"k": jnp.ones((2, 3, 4, 3)), **PARAMS}
    grads = {"k": jnp.cos(jnp.arange(72.0)).reshape(2, 3, 4, 3), **GRADS}
    updates, _ = update(grads, tx.init(params), params)
    for leaf in (updates["k"], updates["w"]):
        np.testing.assert_allclose(jnp.mean(leaf**2, axis=(-2, -1)), 1.0, rtol=1e-4)
    np.testing.assert_allclose(jnp.mean(updates["b"] ** 2), 1.0, rtol=1e-4)


@pytest.mark.parametrize("where", ["gradient", "params"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("make", [celo2, celo2_adamw])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(make, where, value):
    tx, update = run(make)
    _, before = update(GRADS, tx.init(PARAMS), PARAMS)
    for leaf in ("w", "b"):
        bad = {"gradient": dict(GRADS), "params": dict(PARAMS)}
        bad[where][leaf] = bad[where][leaf].ravel().at[1].set(value).reshape(PARAMS[leaf].shape)
        updates, after = update(bad["gradient"], before, bad["params"])
        jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)
        expected = before._replace(skipped=jnp.int32(1))
        if make is celo2:
            expected = expected._replace(t=jnp.int32(2))  # of all updates, as that of the others
        jax.tree.map(np.testing.assert_array_equal, after, expected)
    updates, _ = update(GRADS, after, PARAMS)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates)) and np.any(updates["w"])


def test_the_rates_of_a_cosine_schedule_fall_to_zero_at_the_horizon():
    cosine = celo2_adamw(3e-3, schedule="cosine", weight_decay=0.1)
    tx = cosine.apply(trained(), num_steps=7)
    rate = lambda count: 3e-3 * (0.5 + 0.5 * jnp.cos(jnp.pi * count / 7))
    same = celo2_adamw(rate, weight_decay=0.1).apply(trained())
    state, same_state = tx.init(PARAMS), same.init(PARAMS)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        expected, same_state = jax.jit(same.update)(GRADS, same_state, PARAMS)
        for ours, theirs in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    with pytest.raises(ValueError, match="apply needs the number of updates of the whole run"):
        cosine.apply(trained())


def test_a_direction_that_imitates_muon():
    mix = (0.2, 0.5, 0.3)
    tx = celo2().apply(imitate_muon(trained(), mix))
    state, grads = tx.init(PARAMS), np.asarray(GRADS["w"])
    momenta = np.zeros((3, 4, 3))
    for step in range(3):
        g = np.roll(grads, step, axis=0)
        direction, state = jax.jit(tx.update)({**GRADS, "w": jnp.asarray(g)}, state, PARAMS)
        decays = np.array([0.9, 0.99, 0.999])[:, None, None]
        momenta = decays * momenta + (1 - decays) * g
        sizes = np.sqrt(1e-9 + np.mean(momenta**2, axis=(1, 2), keepdims=True))
        u = newton_schulz(jnp.asarray(np.tensordot(mix, momenta / sizes, 1)))
        np.testing.assert_allclose(direction["w"], u / np.sqrt(np.mean(u**2)), atol=1e-4)


def test_labels_are_those_of_the_authors():
    leaf = jnp.zeros
    params = {"Dense": {"kernel": leaf((2, 3)), "bias": leaf(3)}, "Embed_0": {"e": leaf((5, 2))}}
    assert celo2_labels(params) == {
        "Dense": {"kernel": "celo2", "bias": "adam"},
        "Embed_0": {"e": "adam"},
    }


def test_init_has_the_published_size():
    theta = celo2().init(jax.random.key(0), {})
    assert sum(x.size for x in jax.tree.leaves(theta)) == 347


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx, s: tx.update(GRADS, s), "celo2: update needs `params`"),
        (lambda tx, s: tx.init({"n": jnp.arange(3)}), "celo2: leaf 'n' has dtype int32"),
        (lambda tx, s: celo2().apply({"w": jnp.ones(3)}), "celo2: these are not Celo2's"),
        (lambda tx, s: celo2().apply(None), "celo2: theta must be a dict"),
        (lambda tx, s: celo2_adamw(-1.0), r"celo2_adamw: lr must not be negative, got -1\.0"),
        (lambda tx, s: celo2_adamw(adam_factor=np.nan), "adam_factor must be a finite number"),
    ],
)
def test_misuse_is_explained(call, message):
    tx, _ = run()
    with pytest.raises(ValueError, match=message):
        call(tx, tx.init(PARAMS))
