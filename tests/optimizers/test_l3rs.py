"""Properties of L3RS; the mixture is compared with optax's own optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from metaopt import optimizers
from metaopt.core.rollouts import unroll
from metaopt.optimizers import BASES, Base

l3rs = functools.cache(optimizers.l3rs)  # so that `stepper` compiles each of its forms once

PARAMS = {
    "a": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
    "b": {"kernel": jnp.full((3, 2), -0.5), "bias": jnp.zeros(2)},
}
LAYERS = ["a/bias", "a/kernel", "b/bias", "b/kernel"]


def gradients(n, params=PARAMS):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return [unravel(g) for g in jax.random.normal(jax.random.key(5), (n, flat.size))]


@functools.cache
def stepper(lopt, num_steps):
    """``(theta, gradients, state, params, value) -> updates, state``, compiled."""

    @jax.jit
    def step(theta, grad, state, params, value):
        return lopt.apply(theta, num_steps=num_steps).update(grad, state, params, value=value)

    return step


def run(lopt, theta, grads, params=PARAMS, num_steps=20):
    state, updates = lopt.apply(theta, num_steps=num_steps).init(params), []
    step = stepper(lopt, num_steps)
    for k, grad in enumerate(grads):
        update, state = step(theta, grad, state, params, jnp.float32(1.0 / (k + 1)))
        params = optax.apply_updates(params, update)
        updates.append(update)
    return params, updates, state


def random_theta(lopt, params=PARAMS, scale=0.3):
    @jax.jit
    def draw():
        theta = lopt.init(jax.random.key(0), params)
        flat, unravel = jax.flatten_util.ravel_pytree(theta)
        return unravel(flat + scale * jax.random.normal(jax.random.key(1), flat.shape))

    return draw()


def hand_set(lopt, theta, feature, offset):
    """Returns a theta whose o_0 is input `feature` plus `offset`, with alpha on the first base.

    relu(x) - relu(-x) = x carries the feature through both hidden layers.
    """
    net = jax.tree.map(jnp.zeros_like, theta["net"])
    first, second, last = (f"Dense_{i}" for i in range(3))
    net[first]["kernel"] = net[first]["kernel"].at[feature, :2].set(jnp.array([1.0, -1.0]))
    net[second]["kernel"] = net[second]["kernel"].at[0, 0].set(1.0).at[1, 1].set(1.0)
    net[last]["kernel"] = net[last]["kernel"].at[:2, 0].set(jnp.array([1.0, -1.0]))
    net[last]["bias"] = net[last]["bias"].at[0].set(offset).at[1].set(50.0)
    return {**theta, "net": net}


OPTAX = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "lion": lambda lr: optax.lion(lr, weight_decay=0.0),
    "lamb": optax.lamb,
    "muon": optax.contrib.muon,
}


@pytest.mark.parametrize("name", OPTAX)
def test_one_hot_mixture_with_the_norm_of_the_base_step_is_the_base_optimizer(name):
    other = "sgd" if name != "sgd" else "adam"
    lopt, lr, lambda_0 = l3rs((name, other), variant="none", ema="none"), 0.03, 1e-2
    theta = lopt.init(jax.random.key(0), PARAMS)
    log_norm = 11 + 7  # features: relative time, absolute time, then log ||d_p||
    theta = hand_set(lopt, theta, log_norm, np.log(lr / lambda_0))
    # Start away from zero: at biases of norm zero LAMB's direction has another scale.
    params = jax.tree.map(lambda x: x + 0.1, PARAMS)
    grads = gradients(10)
    ours, _, _ = run(lopt, theta, grads, params)
    tx = OPTAX[name](lr)
    state, theirs, update_fn = tx.init(params), params, jax.jit(tx.update)
    for grad in grads:
        updates, state = update_fn(grad, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-4, atol=3e-6)


@pytest.mark.parametrize("name", OPTAX)
def test_a_base_by_itself_is_optax_at_rate_one(name):
    base, params = BASES[name], jax.tree.map(lambda x: x + 0.1, PARAMS)
    ours, theirs = base.make(base.hyper), OPTAX[name](1.0)
    state, reference = ours.init(params), theirs.init(params)
    for grad in gradients(5):  # op by op: rounding differs between two compiled programs
        step, state = ours.update(grad, state, params)
        expected, reference = theirs.update(grad, reference, params)
        for a, b in zip(jax.tree.leaves(step), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_weight_decay_direction_points_to_zero():
    lopt = l3rs(("weight_decay",), variant="none")
    theta = lopt.init(jax.random.key(0), PARAMS)
    _, (update,), state = run(lopt, theta, gradients(1))
    for layer, (kernel, step) in enumerate(
        [
            (PARAMS["a"]["kernel"], update["a"]["kernel"]),
            (PARAMS["b"]["kernel"], update["b"]["kernel"]),
        ]
    ):
        norm = state.lambda_[2 * layer + 1]
        np.testing.assert_allclose(step, -norm * kernel / np.linalg.norm(kernel), rtol=1e-5)
    np.testing.assert_array_equal(update["a"]["bias"], np.zeros(3))  # no direction: no step


@pytest.mark.parametrize("variant", ["embedding", "none", "per_layer", "global"])
def test_step_norm_is_bounded_by_lambda(variant):
    lopt = l3rs(variant=variant)
    theta = random_theta(lopt)
    state, step = lopt.apply(theta, num_steps=20).init(PARAMS), stepper(lopt, 20)
    for grad in gradients(6):
        updates, state = step(theta, grad, state, PARAMS, 1.0)
        norms = np.array([np.linalg.norm(x.ravel()) for x in jax.tree.leaves(updates)])
        assert (norms <= np.asarray(state.lambda_) * (1 + 1e-5)).all()
        np.testing.assert_allclose(np.sum(state.alpha, axis=1), 1.0, rtol=1e-6)


def test_zero_gradients_give_finite_steps():
    lopt = l3rs()
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    _, updates, state = run(lopt, random_theta(lopt), [zeros] * 3)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
    assert state.skipped == 0


def test_direction_of_sgd_does_not_feel_the_scale_of_a_layers_gradient():
    lopt = l3rs(("sgd",), variant="none", ema="none")
    theta = lopt.init(jax.random.key(0), PARAMS)  # constant lambda
    (grad,) = gradients(1)
    scaled = {**grad, "a": jax.tree.map(lambda g: 64.0 * g, grad["a"])}
    _, (plain,), _ = run(lopt, theta, [grad])
    _, (other,), _ = run(lopt, theta, [scaled])
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("ema, fewer", [("three", 0), ("one", 6), ("raw", 6), ("none", 9)])
def test_number_of_inputs_follows_the_set_of_averages(ema, fewer):
    theta = l3rs(ema=ema).init(jax.random.key(0), PARAMS)
    assert theta["net"]["Dense_0"]["kernel"].shape[0] == 45 - fewer


def test_layers_permute_with_their_names():
    swapped = {"a": PARAMS["b"], "b": PARAMS["a"]}
    lopt = l3rs()
    theta = random_theta(lopt)
    renamed = lambda name: {"a": "b", "b": "a"}[name[0]] + name[1:]
    table = {name: theta["embedding"][renamed(name)] for name in theta["embedding"]}
    grads = gradients(3)
    other_grads = [{"a": g["b"], "b": g["a"]} for g in grads]
    plain, _, _ = run(lopt, theta, grads)
    other, _, _ = run(lopt, {**theta, "embedding": table}, other_grads, swapped)
    for name in "ab":
        for a, b in zip(
            jax.tree.leaves(plain[name]),
            jax.tree.leaves(other[{"a": "b", "b": "a"}[name]]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_identical_layers_without_embedding_get_identical_mixtures():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    lopt = l3rs(variant="none")
    grad = jax.random.normal(jax.random.key(3), (3, 2))
    _, _, state = run(lopt, random_theta(lopt, params), [{"a": grad, "b": grad}] * 3, params)
    np.testing.assert_array_equal(state.lambda_[0], state.lambda_[1])
    np.testing.assert_array_equal(state.alpha[0], state.alpha[1])


def test_a_network_per_layer_changes_its_own_layer_only():
    lopt = l3rs(variant="per_layer")
    theta = random_theta(lopt)
    changed = {**theta["net"], "a/bias": jax.tree.map(lambda w: w + 0.1, theta["net"]["a/bias"])}
    (grads,) = gradients(1)
    _, _, plain = run(lopt, theta, [grads])
    _, _, other = run(lopt, {**theta, "net": changed}, [grads])
    differs = np.asarray(plain.lambda_ != other.lambda_)
    np.testing.assert_array_equal(differs, [name == "a/bias" for name in LAYERS])


def test_global_variant_has_one_mixture():
    lopt = l3rs(variant="global")
    _, _, state = run(lopt, random_theta(lopt), gradients(2))
    assert np.ptp(np.asarray(state.lambda_)) == 0
    assert np.ptp(np.asarray(state.alpha), axis=0).max() == 0


def test_lamb_direction_is_adams_direction():
    equal = Base("lamb_like_adam", {}, lambda h: optax.lamb(1.0, eps=1e-8))
    _, updates, _ = run(*_constant(l3rs(("adam",), variant="none")), gradients(5))
    _, others, _ = run(*_constant(optimizers.l3rs((equal,), variant="none")), gradients(5))
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def _constant(lopt):
    return lopt, lopt.init(jax.random.key(0), PARAMS)


def test_leaves_can_be_grouped_into_layers():
    lopt = l3rs(("sgd",), variant="none", layer_names=lambda params: ["a", "a", "b", "b"])
    theta = lopt.init(jax.random.key(0), PARAMS)
    _, (update,), state = run(lopt, theta, gradients(1))
    assert state.lambda_.shape == (2,)
    for name, norm in zip("ab", state.lambda_, strict=True):
        np.testing.assert_allclose(optax.tree.norm(update[name]), norm, rtol=1e-5)


def test_memory_beyond_the_base_optimizers_does_not_grow_with_the_parameters():
    def extra(width):
        params = {"w": jnp.ones((width, width)), "b": jnp.zeros(width)}
        lopt = l3rs(("sgd", "adam"))
        state = lopt.apply(lopt.init(jax.random.key(0), params), num_steps=10).init(params)
        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        return size(state) - size(state.base)

    assert extra(4) == extra(400)


def test_base_hyper_parameters_are_meta_learned():
    lopt = l3rs()
    theta = lopt.init(jax.random.key(0), PARAMS)
    np.testing.assert_allclose(jax.nn.sigmoid(theta["base"]["adam"]["logit_b1"]), 0.9, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(theta["base"]["adam"]["log_eps"]), 1e-8, rtol=1e-5)
    theta = random_theta(lopt)

    def final(theta):
        params, _, _ = run(lopt, theta, gradients(4))
        return sum(jnp.sum(x) for x in jax.tree.leaves(params))

    slope = jax.grad(final)(theta)["base"]["adam"]["logit_b1"]
    assert np.isfinite(slope) and slope != 0


MOMENTUM = optax.sgd(1.0, momentum=0.9)


@functools.cache
def after_three_steps(lopt):
    """(theta, state)"""
    theta = random_theta(lopt)
    return theta, run(lopt, theta, gradients(3))[2]


@pytest.mark.parametrize(
    "where, bad",
    # The square of 1e30 is not finite.
    [("grad", jnp.nan), ("grad", jnp.inf), ("grad", 1e30), ("value", jnp.nan), ("value", jnp.inf)],
)
@pytest.mark.parametrize("base", [*BASES, MOMENTUM], ids=[*BASES, "momentum"])
def test_a_non_finite_step_is_skipped_and_counted(where, bad, base):
    lopt = l3rs((base,))
    theta, before = after_three_steps(lopt)
    (grad,) = gradients(1)
    value = 1.0
    if where == "grad":
        grad["a"]["kernel"] = grad["a"]["kernel"].at[0, 0].set(bad)
    else:
        value = bad
    updates, after = stepper(lopt, 20)(theta, grad, before, PARAMS, jnp.float32(value))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert (after.skipped, after.count) == (1, before.count + 1)
    for a, b in zip(jax.tree.leaves(before.base), jax.tree.leaves(after.base), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("base", [*BASES, MOMENTUM], ids=[*BASES, "momentum"])
def test_a_step_that_overflows_is_left_out_and_states_stay_finite(base):
    lopt = l3rs((base,), variant="none")
    theta = lopt.init(jax.random.key(0), PARAMS)
    theta["net"]["Dense_2"]["bias"] = jnp.full(2, 100.0)  # exp(100) is not a float32
    start = jax.tree.map(lambda x: x + 0.1, PARAMS)
    _, updates, state = run(lopt, theta, gradients(3), start)
    assert state.skipped == 3
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.base))


@pytest.mark.parametrize("mine", [MOMENTUM, optax.polyak_sgd()], ids=["momentum", "polyak"])
def test_user_transformations_can_be_bases(mine):  # polyak_sgd needs the loss
    lopt = l3rs((mine, "adam"), variant="none")
    _, updates, state = run(lopt, lopt.init(jax.random.key(0), PARAMS), gradients(3))
    assert state.alpha.shape == (4, 2)
    assert np.isfinite(optax.tree.norm(updates))


@pytest.mark.parametrize(
    "bases",
    [("sgd",), ("adam",), ("adam", "lion", "lamb"), ("adamax", "sgd", "lamb"), tuple(BASES)],
)
def test_the_papers_sets_of_bases_run(bases):
    lopt = l3rs(bases)
    params, _, state = run(lopt, random_theta(lopt), gradients(3))
    assert state.alpha.shape == (4, len(bases))
    assert np.isfinite(optax.tree.norm(params))


@pytest.mark.parametrize("base", BASES)
def test_the_meta_gradient_is_finite_where_a_gradient_is_always_zero(base):
    """A dead pixel: the second moment of its weight is 0, where sqrt has no derivative."""
    lopt = l3rs((base,))
    loss = lambda x, batch: jnp.sum((x[1:] - 1.0) ** 2)
    start = jnp.arange(3.0)
    theta = lopt.init(jax.random.key(0), start)

    def final(theta):
        tx = lopt.apply(theta, num_steps=3)
        return loss(unroll(tx, start, tx.init(start), loss, jnp.zeros(3))[0], None)

    gradient = jax.jit(jax.grad(final))(theta)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_python_float_is_a_leaf_as_for_adam():
    params, lopt = {"scale": 1.0, "w": jnp.ones(3)}, l3rs(variant="none")
    as_arrays = jax.tree.map(jnp.asarray, params)
    tx = lopt.apply(lopt.init(jax.random.key(0), params), num_steps=10)
    found, _ = tx.update(as_arrays, tx.init(params), params, value=1.0)
    expected, _ = tx.update(as_arrays, tx.init(as_arrays), as_arrays, value=1.0)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("variant", ["embedding", "none", "per_layer", "global"])
def test_a_partition_may_leave_it_no_leaves(variant):
    lopt = l3rs(variant=variant)
    tx = lopt.apply(lopt.init(jax.random.key(0), PARAMS), num_steps=10)
    labels = jax.tree.map(lambda _: "frozen", PARAMS)
    tx = optax.partition({"train": tx, "frozen": optax.set_to_zero()}, labels)
    (grad,) = gradients(1)
    updates, state = tx.update(grad, tx.init(PARAMS), PARAMS, value=jnp.array(1.0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert optax.tree.get(state.inner_states["train"], "skipped") == 0


def test_errors_name_what_is_wrong():
    theta = l3rs().init(jax.random.key(0), PARAMS)
    tx = l3rs().apply(theta, num_steps=10)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="value=loss"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, state, value=1.0)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        l3rs().apply(theta, num_steps=0)
    with pytest.raises(ValueError, match=r"num_steps=\.\.\."):
        l3rs().apply(theta)
    with pytest.raises(ValueError, match=r"\['c'\]"):
        tx.init({**PARAMS, "c": jnp.ones(2)})
    with pytest.raises(ValueError, match="int32"):
        tx.init({"a": jnp.ones(3, jnp.int32)})
    for kwargs, match in [
        ({"base": ()}, "at least one"),
        ({"base": ("adam", "adam")}, "must differ"),
        ({"base": ("adamm",)}, "unknown base 'adamm'"),
        ({"variant": "big"}, "variant"),
        ({"ema": "four"}, "ema"),
        ({"ema": (1.0,)}, "ema decays"),
        ({"lambda_0": 0.0}, "lambda_0"),
    ]:
        with pytest.raises(ValueError, match=match):
            l3rs(**kwargs)


def test_an_embedding_serves_the_variables_of_flax_nnx():
    """Their params end in ``.value``, their gradients do not: both name the same layers."""
    lopt = l3rs()
    model, data = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = lopt.apply(lopt.init(jax.random.key(0), plain), num_steps=5)
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(plain)
    for _ in range(2):
        loss, grads = nnx.value_and_grad(lambda m: jnp.sum(m(data) ** 2))(model)
        updates, state = tx.update(nnx.to_pure_dict(grads), state, plain, value=loss)
        plain = optax.apply_updates(plain, updates)
        optimizer.update(model, grads, value=loss)
    for name, leaf in nnx.to_pure_dict(nnx.state(model, nnx.Param)).items():
        np.testing.assert_allclose(leaf, plain[name], rtol=1e-6)
