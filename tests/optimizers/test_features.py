"""Formulas of the features, compared with numpy, and their exact properties."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaopt.optimizers.features import (
    absolute_time,
    ema_debias,
    ema_update,
    log_sign,
    relative_time,
)

GRADIENTS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(derandomize=True, deadline=None)
@given(GRADIENTS, st.sampled_from([1.0, 5.0, 10.0]))
def test_log_sign_follows_the_two_branches_of_the_paper(g, p):
    if abs(g) >= np.exp(-p) * (1 + 1e-6):
        expected = (np.log(abs(g)) / p, np.sign(g))
    elif abs(g) <= np.exp(-p) * (1 - 1e-6):
        expected = (-1.0, np.exp(p) * g)
    else:
        expected = (-1.0, np.sign(g))
    np.testing.assert_allclose(log_sign(jnp.float32(g), p), expected, rtol=1e-5, atol=1e-6)


@settings(derandomize=True, deadline=None)
@given(GRADIENTS)
def test_log_sign_is_bounded_below_and_odd(g):
    plus, minus = log_sign(jnp.float32(g)), log_sign(jnp.float32(-g))
    assert plus[0] == minus[0] and plus[1] == -minus[1]
    assert plus[0] >= -1.0 and abs(plus[1]) <= 1.0


def test_log_sign_of_zero_is_minus_one_and_zero():
    np.testing.assert_array_equal(log_sign(jnp.zeros(3)), [[-1.0, 0.0]] * 3)


def test_log_sign_is_linear_in_the_logarithm():
    step = log_sign(jnp.float32(7.0 * 0.03)) - log_sign(jnp.float32(0.03))
    np.testing.assert_allclose(step, [np.log(7.0) / 10.0, 0.0], rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_debiased_average_of_a_constant_is_that_constant(count):
    gammas, ema = jnp.array([0.0, 0.5, 0.9, 0.99]), jnp.zeros((2, 4))
    value = jnp.array([3.5, -2.0])
    for _ in range(count):
        ema = ema_update(ema, value, gammas)
    debiased = ema_debias(ema, jnp.array(count), gammas)
    np.testing.assert_allclose(debiased, np.repeat(value[:, None], 4, axis=1), rtol=2e-5)


def test_gamma_zero_returns_the_raw_value():
    gammas = jnp.array([0.0])
    ema = ema_update(ema_update(jnp.zeros(1), jnp.float32(9.0), gammas), jnp.float32(4.0), gammas)
    np.testing.assert_array_equal(ema_debias(ema, jnp.array(2), gammas), [4.0])


def test_relative_time_is_zero_at_its_point_and_depends_on_the_fraction_only():
    points = (0.0, 0.5, 1.0)
    at = lambda k, n: relative_time(jnp.array(k), n, points)
    np.testing.assert_array_equal(at(50, 100)[1], 0.0)
    np.testing.assert_array_equal(at(5, 10), at(500, 1000))
    assert (np.diff([at(k, 100) for k in range(0, 101, 10)], axis=0) >= 0).all()


def test_absolute_time_is_zero_where_the_horizon_equals_the_scale():
    np.testing.assert_allclose(absolute_time(100, (10.0, 100.0))[1], 0.0, atol=1e-6)
    ratio = 10.0
    expected = (ratio**2 - 1) / (ratio**2 + 1)  # tanh(log r)
    np.testing.assert_allclose(absolute_time(100, (10.0, 100.0))[0], expected, rtol=1e-5)
