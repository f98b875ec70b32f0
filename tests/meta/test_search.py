"""The search for a start of meta-training, on quadratics whose best learning rates are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.meta import search
from metaopt.optimizers import L3RS

PARAMS = {"flat": jnp.ones(1), "steep": jnp.ones(1)}
KEY = jax.random.key(0)


def one_step(settings, steep):
    """``(theta, key) -> loss`` after one step from 1 on ``(x^2 + steep y^2) / 2``."""
    lopt = settings.build()

    def validate(theta, key):
        del key
        tx = lopt.apply(theta, num_steps=1)
        grads = {"flat": PARAMS["flat"], "steep": steep * PARAMS["steep"]}
        step, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value=jnp.ones([]))
        end = jax.tree.map(jnp.add, PARAMS, step)
        return jnp.sum(end["flat"] ** 2 + steep * end["steep"] ** 2) / 2

    return validate, lopt.init(KEY, PARAMS)


def test_finds_the_best_rate_of_the_grid():
    """Gradient descent at rate 1 / curvature is at the minimum after one step."""
    settings = L3RS(base=("sgd", "adam"), variant="none", hidden=(4,), lambda_0=1e-3)
    validate, theta = one_step(settings, 1.0)
    found = search(settings, theta, validate, KEY, points=4 * 9)
    rates = 0.01 * 300.0 ** ((np.arange(9) + 0.5) / 9)
    expected = rates[np.argmin((1 - rates) ** 2)]
    assert found.point["base"] == "sgd"
    np.testing.assert_allclose(found.point["lr"], expected, rtol=1e-6)
    np.testing.assert_allclose(found.loss, (1 - expected) ** 2, rtol=0.05, atol=1e-4)
    np.testing.assert_allclose(validate(found.theta, KEY), found.loss, rtol=1e-4)
    assert len(found.losses) == 4 * 9 + 1 and min(found.losses) == found.loss


@pytest.mark.parametrize("variant", ["embedding", "per_layer"])
def test_rates_of_layers_are_better_where_curvatures_differ(variant):
    settings = L3RS(base=("sgd",), variant=variant, hidden=(4,), lambda_0=1e-3)
    validate, theta = one_step(settings, 4.0)
    found = search(settings, theta, validate, KEY, points=200)
    best_for_all = min(found.losses[1:101])
    rates = found.point["lr"]
    assert found.loss < 0.2 * best_for_all
    expected = ((1 - rates["flat"]) ** 2 + 4 * (1 - 4 * rates["steep"]) ** 2) / 2
    np.testing.assert_allclose(found.loss, expected, rtol=1e-2, atol=1e-4)


def test_the_given_theta_competes_and_what_is_not_finite_loses():
    settings = L3RS(base=("sgd",), variant="none", hidden=(4,))
    theta = settings.build().init(KEY, PARAMS)
    first = theta["net"]["Dense_0"]["kernel"]

    def validate(tried, key):
        del key
        return jnp.where(jnp.all(tried["net"]["Dense_0"]["kernel"] == first), 1.0, jnp.nan)

    found = search(settings, theta, validate, KEY, points=4)
    assert found.point == {} and found.loss == 1.0
    assert found.losses == [1.0, *[np.inf] * 4]
    assert found.theta is theta


@pytest.mark.parametrize(
    ("base", "points", "message"),
    [
        (("sgd", "adam"), 3, "points must be at least 4"),
        (("weight_decay",), 8, "none of the bases weight_decay is an optimizer by itself"),
    ],
)
def test_errors(base, points, message):
    settings = L3RS(base=base, variant="none", hidden=(4,))
    theta = settings.build().init(KEY, PARAMS)
    with pytest.raises(ValueError, match=message):
        search(settings, theta, lambda theta, key: jnp.zeros([]), KEY, points=points)
