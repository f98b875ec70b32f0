"""Statistics against known answers."""

import numpy as np
import pytest
from scipy.stats import norm

from metaopt.statistics import divergence_rate, mean_interval, steps_to_reach


def test_interval_of_a_normal_sample_matches_theory():
    values = np.random.default_rng(0).normal(5.0, 2.0, (400, 3))
    interval = mean_interval(values)
    np.testing.assert_allclose(interval.mean, values.mean(axis=0))
    width = 2 * norm.ppf(0.975) * values.std(axis=0) / np.sqrt(400)
    np.testing.assert_allclose(interval.high - interval.low, width, rtol=0.1)
    assert (interval.low < interval.mean).all() and (interval.mean < interval.high).all()


def test_interval_covers_the_true_mean_in_most_samples():
    rng = np.random.default_rng(1)
    samples = rng.normal(0.0, 1.0, (25, 400))  # 400 experiments of 25 seeds
    interval = mean_interval(samples)
    covered = np.mean((interval.low < 0) & (0 < interval.high))
    assert 0.90 < covered < 0.97


@pytest.mark.parametrize("values", [np.ones((1, 4)), np.ones((5, 4))])
def test_one_seed_or_equal_seeds_have_no_width(values):
    interval = mean_interval(values)
    np.testing.assert_array_equal(interval.low, interval.high)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_seed_is_not_averaged_away(bad):
    values = np.ones((5, 2))
    values[3, 1] = bad
    interval = mean_interval(values)
    assert interval.mean[0] == 1.0 and interval.mean[1] == np.inf


def test_steps_to_reach():
    steps, loss = np.array([0, 10, 20, 30]), np.array([3.0, 2.0, 1.0, 2.0])
    assert steps_to_reach(steps, loss, 2.0) == 10
    assert steps_to_reach(steps, loss, 1.5) == 20
    assert steps_to_reach(steps, loss, 0.5) == np.inf
    assert steps_to_reach(steps, np.full(4, np.nan), 0.5) == np.inf


def test_divergence_rate():
    loss = np.array([[1.0, 0.5], [1.0, 1.9], [1.0, 2.1], [1.0, np.nan]])
    assert divergence_rate(loss) == 0.5
