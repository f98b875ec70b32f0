"""L3RS takes the steps of optax's optimizers with the theta of `imitate`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaopt
from metaopt.core.trees import leaf_names
from metaopt.optimizers import L3RS, imitate
from metaopt.tasks import catalog

K = 60
SETTINGS = L3RS(base=("sgd", "adam", "lion"), variant="none", hidden=(8,), lambda_0=0.1)
FAMILY = catalog.family("digits")
TASK = FAMILY.task(FAMILY.sample(jax.random.key(0)))
PARAMS = TASK.init(jax.random.key(0))
NAMES = leaf_names(PARAMS)
MAKE = {"sgd": optax.sgd, "adam": optax.adam, "lion": optax.lion}
RATES = {"sgd": 0.3, "adam": 0.01, "lion": 0.003}


def run(tx):
    """Params and losses of K steps."""
    batches = TASK.sample(jax.random.key(1), (K,))
    unroll = jax.jit(lambda p: metaopt.unroll(tx, p, tx.init(p), TASK.loss, batches))
    params, _, losses = unroll(PARAMS)
    return params, losses


def imitated(settings=SETTINGS, **arguments):
    lopt = settings.build()
    theta = imitate(settings, lopt.init(jax.random.key(2), PARAMS), **arguments)
    return lopt.apply(theta, num_steps=K)


@pytest.mark.parametrize("base", list(MAKE))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden": (5, 4)},
        {"hidden": ()},
        {"ema": "none"},
        {"variant": "embedding"},
        {"variant": "per_layer"},
    ],
    ids=str,
)
def test_steps_are_those_of_optax(base, changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    tx = imitated(settings, base=base, lr=RATES[base], share=1 - 1e-6)
    # With weight decay of Lion 0, as in L3RS.
    own = {"weight_decay": 0.0} if base == "lion" else {}
    params, losses = run(tx)
    expected, expected_losses = run(MAKE[base](RATES[base], **own))
    # A sign of Lion may differ where its argument is 0 but for rounding.
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-3)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, atol=0.02 * float(jnp.max(jnp.abs(other))))


def test_cosine_is_nearly_that_of_optax():
    tx = imitated(base="adam", lr=0.02, schedule="cosine", share=1 - 1e-6)
    state = tx.init(PARAMS)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.ones([])))
    adam = optax.scale_by_adam()
    adam_state = adam.init(PARAMS)
    schedule = optax.cosine_decay_schedule(0.02, K)
    for t in range(K):
        grads = TASK.init(jax.random.fold_in(jax.random.key(3), t))
        _, state = update(grads, state, PARAMS)
        direction, adam_state = adam.update(grads, adam_state)
        norms = [jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(direction)]
        expected = schedule(t) * jnp.stack(norms)
        assert np.max(np.abs(state.lambda_ - expected)) < 0.02 * 0.02 * max(norms)


def test_each_layer_has_its_own_rate():
    rates = dict(zip(NAMES, np.geomspace(1e-3, 1e-1, len(NAMES)), strict=True))
    for variant in ("embedding", "per_layer"):
        settings = dataclasses.replace(SETTINGS, variant=variant)
        tx = imitated(settings, base="adam", lr=rates, share=1 - 1e-6)
        grads = jax.grad(TASK.loss)(PARAMS, TASK.sample(jax.random.key(1), ()))
        step, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value=jnp.ones([]))
        adam = optax.scale_by_adam()
        direction, _ = adam.update(grads, adam.init(PARAMS))
        for rate, leaf, other in zip(
            rates.values(), jax.tree.leaves(step), jax.tree.leaves(direction), strict=True
        ):
            np.testing.assert_allclose(leaf, -rate * other, atol=1e-4 * rate)


def test_the_rate_depends_on_the_horizon_and_on_the_size_of_a_layer():
    """lambda = lr (K / 100)^a (|d| / 10)^(b - 1) |d|, here of gradient descent."""
    lopt = SETTINGS.build()
    powers = {"horizon_power": -0.5, "norm_power": 0.7}
    theta = imitate(
        SETTINGS, lopt.init(jax.random.key(2), PARAMS), base="sgd", lr=0.1, share=1 - 1e-6, **powers
    )
    grads = TASK.init(jax.random.key(3))
    norms = np.array([np.linalg.norm(leaf) for leaf in jax.tree.leaves(grads)])
    for horizon in (10, 47, 100, 1000, 10_000):
        tx = lopt.apply(theta, num_steps=horizon)
        _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value=jnp.ones([]))
        expected = 0.1 * (horizon / 100) ** -0.5 * (norms / 10) ** -0.3 * norms
        np.testing.assert_allclose(state.lambda_, expected, rtol=0.02)


def test_constants_of_the_base_are_those_given():
    logit = lambda b: float(np.log(b / (1 - b)))
    tx = imitated(base="adam", lr=0.01, share=1 - 1e-6, constants={"logit_b1": logit(0.5)})
    _, losses = run(tx)
    _, expected = run(optax.adam(0.01, b1=0.5))
    _, other = run(optax.adam(0.01))
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    assert np.max(np.abs(other / expected - 1)) > 0.02


def test_other_units_stay_and_the_start_is_as_good_as_its_base():
    """With the default share, the other bases have some weight, and training begins near Adam."""
    lopt = SETTINGS.build()
    before = lopt.init(jax.random.key(2), PARAMS)
    theta = imitate(SETTINGS, before, base="adam", lr=0.03, schedule="cosine")
    kernel = theta["net"]["Dense_0"]["kernel"]
    assert np.array_equal(kernel[:, 2:], before["net"]["Dense_0"]["kernel"][:, 2:])
    _, losses = run(lopt.apply(theta, num_steps=K))
    _, expected = run(optax.adam(optax.cosine_decay_schedule(0.03, K)))
    assert abs(np.mean(losses[-10:]) / np.mean(expected[-10:]) - 1) < 0.1


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"base": "muon"}, "base must be one of sgd, adam, lion, got 'muon'"),
        ({}, {"schedule": "step"}, "schedule must be one of constant, cosine"),
        ({}, {"lr": 0.0}, "lr must be positive"),
        ({}, {"lr": {"w": 0.1}}, "must name the layers"),
        ({"variant": "embedding"}, {"lr": {"w": 0.1}}, "must name the layers"),
        ({"variant": "global"}, {}, "one step norm for all layers"),
        ({"hidden": (4, 1)}, {}, "at least 2 units"),
        ({}, {"share": 1.0}, "share must be"),
        ({}, {"horizon_power": np.inf}, "horizon_power must be"),
        ({}, {"norm_power": "1"}, "norm_power must be"),
        ({}, {"constants": {"b1": 0.5}}, "constants of adam must be one of logit_b1, logit_b2"),
        ({}, {"constants": {"logit_b1": np.nan}}, "logit_b1 of adam must be"),
    ],
)
def test_errors(changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        imitated(
            dataclasses.replace(SETTINGS, **changes),
            **{"base": "adam", "lr": 0.1, **arguments},
        )
