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
    found = search(settings, theta, validate, KEY, points=2 * 4 * 9)  # half of them are the grid
    rates = 0.01 * 300.0 ** ((np.arange(9) + 0.5) / 9)
    expected = rates[np.argmin((1 - rates) ** 2)]
    assert found.point["base"] == "sgd"
    grid = found.losses[1 : 4 * 9 + 1]
    np.testing.assert_allclose(min(grid), (1 - expected) ** 2, rtol=0.05, atol=1e-4)
    np.testing.assert_allclose(validate(found.theta, KEY), found.loss, rtol=1e-4)
    assert len(found.losses) == 2 * 4 * 9 + 1 and min(found.losses) == found.loss < min(grid)


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

    found = search(settings, theta, validate, KEY, points=8)
    assert found.point == {} and found.loss == 1.0
    assert found.losses == [1.0, *[np.inf] * 4]
    assert found.theta is theta


def test_the_rate_falls_with_the_horizon_where_that_is_best():
    """Two kinds of runs, whose best rates for one step are 1 and 10^-1.2."""
    settings = L3RS(base=("sgd",), variant="none", hidden=(4,), lambda_0=1e-3)
    lopt = settings.build()
    kinds = {100: 1.0, 1000: 10**1.2}  # curvature of the loss for each horizon

    def validate(theta, key):
        del key
        losses = []
        for horizon, curvature in kinds.items():
            tx = lopt.apply(theta, num_steps=horizon)
            params = {"flat": jnp.ones(1)}
            step, _ = tx.update(
                {"flat": jnp.full(1, curvature)}, tx.init(params), params, value=jnp.ones([])
            )
            losses.append(jnp.log(0.1 + (1 + step["flat"][0]) ** 2))
        return jnp.stack(losses)

    theta = lopt.init(KEY, PARAMS)
    found = search(settings, theta, validate, KEY, points=240, any_horizon=True)
    a, b = found.point["horizon_power"], found.point["norm_power"]
    rates = {
        horizon: found.point["lr"] * (horizon / 100) ** a * (curvature / 10) ** (b - 1)
        for horizon, curvature in kinds.items()
    }
    for horizon, curvature in kinds.items():
        assert abs(rates[horizon] * curvature - 1) < 0.1
    np.testing.assert_allclose(np.mean(validate(found.theta, KEY)), found.loss, rtol=1e-4)
    # A single rate is at least as far from one of the best ones as their geometric mean.
    assert found.loss < np.log(0.1 + (1 - 10**-0.6) ** 2) / 2
    fixed = search(settings, theta, validate, KEY, points=240)
    assert "horizon_power" not in fixed.point and fixed.loss > found.loss


def test_each_kind_of_runs_counts_by_its_regret():
    """A kind on which losses differ by 100 decides no more than one on which they differ by 3."""
    settings = L3RS(base=("sgd",), variant="none", hidden=(4,))
    theta = settings.build().init(KEY, PARAMS)
    losses = jnp.array([[9.0, 9.0, 9.0], [0.0, 3.0, 3.0], [100.0, 0.0, 0.0], [jnp.nan, 0.0, 0.0]])

    def validate(tried, key):
        del key
        # The bias of the first layer tells the constant learning rates of the grid apart.
        return losses[_place(tried)]

    rates = 0.01 * 300.0 ** ((np.arange(3) + 0.5) / 3)
    places = {float(np.log(rate / settings.lambda_0)): i + 1 for i, rate in enumerate(rates)}

    def _place(tried):
        bias = tried["net"]["Dense_0"]["bias"][0]
        found = jnp.int32(0)
        for value, place in places.items():
            found = jnp.where(jnp.abs(bias - value) < 1e-4, place, found)
        return found

    found = search(settings, theta, validate, KEY, points=12)
    assert found.point["lr"] == pytest.approx(rates[1]) and found.loss == pytest.approx(100 / 3)


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
