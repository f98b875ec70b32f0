"""The held-out loss of a theta, on losses known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structures import falling, geometric

from metaopt.core.types import single
from metaopt.meta import validation
from metaopt.optimizers import adversaries
from metaopt.tasks import quadratic


def test_of_one_family_it_is_the_loss_at_the_end():
    lopt, theta = geometric()
    validate = validation(lopt, falling(3.0, 2), 4)
    np.testing.assert_allclose(validate(theta, jax.random.key(0)), 3.0 * 0.5**4, rtol=1e-6)


def test_on_the_trajectory_it_is_the_mean_loss_before_each_step():
    lopt, theta = geometric()
    validate = validation(lopt, falling(3.0, 2), 4, on="trajectory")
    mean = 3.0 * (1 + 0.5 + 0.25 + 0.125) / 4
    np.testing.assert_allclose(validate(theta, jax.random.key(0)), mean, rtol=1e-6)
    of_two = validation(lopt, [falling(3.0, 2), falling(500.0, 5)], 4, on="trajectory")
    np.testing.assert_allclose(of_two(theta, jax.random.key(0)), mean / 3.0, rtol=1e-6)


def test_anytime_is_the_mean_logarithm_of_the_loss_after_each_quarter():
    lopt, theta = geometric()
    of_two = validation(lopt, [falling(3.0, 2), falling(500.0, 5)], 8, on="anytime")
    logs = [np.log(first * 0.5**step) for first in (3.0, 500.0) for step in (2, 4, 6, 8)]
    np.testing.assert_allclose(of_two(theta, jax.random.key(0)), np.mean(logs), rtol=1e-5)
    negative = validation(lopt, falling(-3.0, 2), 8, on="anytime")
    assert negative(theta, jax.random.key(0)) == jnp.inf


def test_each_family_at_each_length():
    lopt, theta = geometric()
    families = [falling(3.0, 2), falling(500.0, 5)]
    each = validation(lopt, families, (4, 8), on="anytime", each=True)(theta, jax.random.key(0))
    expected = [
        np.mean([np.log(first * 0.5 ** (steps * part / 4)) for part in (1, 2, 3, 4)])
        for first in (3.0, 500.0)
        for steps in (4, 8)
    ]
    np.testing.assert_allclose(each, expected, rtol=1e-5)
    mean = validation(lopt, families, (4, 8), on="anytime")(theta, jax.random.key(0))
    np.testing.assert_allclose(mean, np.mean(expected), rtol=1e-5)


def test_families_weigh_alike_whatever_the_size_of_their_losses():
    lopt, theta = geometric()
    validate = validation(lopt, [falling(3.0, 2), falling(-500.0, 5)], 3)
    # Units keep the sign of the loss: 1 * theta^3 and -1 * theta^3.
    np.testing.assert_allclose(validate(theta, jax.random.key(0)), 0.0, atol=1e-6)
    validate = validation(lopt, [falling(3.0, 2), falling(500.0, 5)], 3)
    np.testing.assert_allclose(validate(theta, jax.random.key(0)), 0.5**3, rtol=1e-6)


@pytest.mark.parametrize("on", ["final", "trajectory", "anytime"])
def test_a_run_that_ends_in_nan_makes_it_infinite(on):
    lopt = adversaries.ADVERSARIES["nan"]
    validate = validation(lopt, single(quadratic()), 3, on=on)
    assert validate({}, jax.random.key(0)) == jnp.inf


def test_sizes_below_one_are_refused():
    lopt, _ = geometric()
    for name in ("num_steps", "runs", "eval_batches"):
        with pytest.raises(ValueError, match=f"validation: {name}"):
            validation(lopt, falling(1.0, 1), **{"num_steps": 1, name: 0})
    for lengths in ((), (4, 0)):
        with pytest.raises(ValueError, match=r"validation: num_steps must be .*, got 0"):
            validation(lopt, falling(1.0, 1), lengths)


def test_another_measure_is_refused():
    lopt, _ = geometric()
    with pytest.raises(ValueError, match="on must be one of final, trajectory, anytime, got"):
        validation(lopt, falling(1.0, 1), 1, on="mean")
