"""Statistics against closed forms, exact enumeration and reference implementations."""

import itertools

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from metaopt.evaluation.statistics import (
    cost_to_reach,
    diverged,
    divergence_rate,
    final_mean,
    iqm_interval,
    loss_ratios,
    mean_interval,
    min_max,
    outcome,
    speedup_against,
    speedups,
    steps_to_reach,
)

STEPS = np.arange(0, 101)


def geometric(rate: float, start: float = 1.0) -> np.ndarray:
    """Loss of gradient descent on x^2 / 2 for one seed: start * (1 - rate)^(2 t)."""
    return start * (1.0 - rate) ** (2.0 * STEPS)[None]


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


def test_interval_of_a_mean_is_the_percentile_bootstrap_of_scipy():
    values = np.random.default_rng(2).lognormal(size=(7, 3, 2))
    interval = mean_interval(values, resamples=20_000)
    expected = bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    np.testing.assert_allclose(interval.low, expected.low, rtol=0.02)
    np.testing.assert_allclose(interval.high, expected.high, rtol=0.02)


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


def test_final_mean_averages_the_last_three_measurements():
    curves = np.array([[9.0, 5.0, 1.0, 2.0, 3.0], [9.0, 9.0, 0.0, 0.0, 6.0]])
    np.testing.assert_array_equal(final_mean(curves), [2.0, 2.0])
    grid = np.stack([curves, 2 * curves])  # any leading axes
    np.testing.assert_array_equal(final_mean(grid), [[2.0, 2.0], [4.0, 4.0]])


def test_final_mean_leaves_out_the_start():
    np.testing.assert_array_equal(final_mean(np.array([9.0, 1.0, 2.0])), 1.5)
    np.testing.assert_array_equal(final_mean(np.array([[9.0, 1.0]])), [1.0])
    np.testing.assert_array_equal(final_mean(np.array([[9.0]])), [9.0])  # nothing else is there


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_final_mean_hides_no_value_that_is_not_finite(bad):
    for last in ([bad, 1.0, 1.0], [1.0, 1.0, bad], [np.inf, 1.0, bad]):
        assert not np.isfinite(final_mean(np.array([1.0, 1.0, *last])))
    assert final_mean(np.array([1.0, bad, 1.0, 1.0, 1.0])) == 1.0  # it came back


def test_a_spike_in_the_last_step_of_one_run_decides_nothing():
    good = np.linspace(2.0, 0.1, 101) * np.linspace(0.9, 1.1, 8)[:, None]
    spiked = good.copy()
    spiked[0, -1] = 1.0
    assert outcome(good, spiked) == outcome(spiked, good) == "tie"
    np.testing.assert_allclose(loss_ratios(good, spiked)[1:], 1.0)
    assert not diverged(spiked).any()
    # What the spike adds to the mean over runs is a third of what it adds at the last step.
    added = final_mean(spiked).mean() - final_mean(good).mean()
    np.testing.assert_allclose(added, (spiked - good)[:, -1].mean() / 3)


def test_divergence_rate():
    loss = np.array([[1.0, 0.5], [1.0, 1.9], [1.0, 2.1], [1.0, np.nan]])
    assert divergence_rate(loss) == 0.5


def test_min_max_band_is_the_lowest_and_highest_seed():
    values = np.array([[1.0, 4.0, np.inf], [3.0, 2.0, 1.0]])
    band = min_max(values)
    np.testing.assert_array_equal(band.mean, [2.0, 3.0, np.inf])
    np.testing.assert_array_equal(band.low, [1.0, 2.0, 1.0])
    np.testing.assert_array_equal(band.high, [3.0, 4.0, np.inf])


def test_iqm_is_the_mean_of_the_middle_half_of_all_runs():
    # Pooled, the scores are 1..8; 1, 2 and 7, 8 are dropped. The mean of the IQMs of both tasks is
    # 13 / 3.
    scores = [np.array([1.0, 2.0, 8.0]), np.array([3.0, 4.0, 5.0, 6.0, 7.0])]
    assert iqm_interval(scores).mean == (3 + 4 + 5 + 6) / 4


def test_iqm_interval_matches_the_reference_implementation():
    # Expected values: rliable 1.2.0 with 20,000 resamples on these scores [runs, tasks].
    scores = np.random.default_rng(0).lognormal(size=(8, 5))
    interval = iqm_interval(list(scores.T), resamples=20_000)
    np.testing.assert_allclose(interval.mean, 0.96597758, rtol=1e-7)
    np.testing.assert_allclose([interval.low, interval.high], [0.75487395, 1.25942526], rtol=0.02)


def test_stratified_bootstrap_matches_all_resamples():
    first, second = np.array([0.0, 1.0, 5.0]), np.array([2.0, 3.0, 9.0])
    means = []
    for i in itertools.product(range(3), repeat=3):
        for j in itertools.product(range(3), repeat=3):
            pooled = np.sort(np.concatenate([first[list(i)], second[list(j)]]))
            means.append(pooled[1:5].mean())  # 25% of 6 scores: 1 is dropped at each end
    interval = iqm_interval([first, second], resamples=40_000)
    exact = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(
        [interval.low, interval.high], exact, atol=0.26
    )  # of the grid of means


def test_runs_are_resampled_within_their_task():
    # A bootstrap over the pooled runs would mix the tasks and have a width.
    interval = iqm_interval([np.full(5, 1.0), np.full(5, 100.0), np.full(5, 7.0)])
    assert interval.low == interval.mean == interval.high


def test_iqm_drops_few_diverged_runs_and_shows_many():
    few, many = np.array([1.0] * 7 + [np.inf]), np.array([1.0] * 3 + [np.inf] * 5)
    assert iqm_interval([few]).mean == 1.0
    assert iqm_interval([many]).mean == np.inf and iqm_interval([many]).high == np.inf


def test_one_run_per_task_has_no_width():
    interval = iqm_interval([np.array([1.0]), np.array([3.0])])
    assert interval.low == interval.high == interval.mean == 2.0


@pytest.mark.parametrize("scores", [[], [np.array([])], [np.array([1.0, np.nan])]])
def test_missing_scores_are_an_error(scores):
    with pytest.raises(ValueError, match="iqm_interval"):
        iqm_interval(scores)


def test_cost_to_reach_interpolates_the_lowest_loss_so_far():
    cost, loss = np.array([0.0, 10, 20, 30]), np.array([4.0, 2.0, 3.0, 1.0])
    assert cost_to_reach(cost, loss, 3.0) == 5.0
    assert cost_to_reach(cost, loss, 1.5) == 25.0  # from 2, not from 3
    assert cost_to_reach(cost, loss, 4.0) == 0.0
    assert cost_to_reach(cost, loss, 0.9) == np.inf
    assert cost_to_reach(cost, np.array([4.0, np.nan, np.inf, 2.0]), 3.0) == 25.0
    assert cost_to_reach(cost, np.full(4, np.nan), 3.0) == np.inf


@pytest.mark.parametrize("ratio", [2.0, 4.0, 0.5, 0.25])
def test_speedup_of_gradient_descent_is_the_ratio_of_its_exponents(ratio):
    rate = 1.0 - 0.99**ratio  # (1 - rate)^t = 0.99^(ratio t)
    factor = speedups(STEPS, geometric(0.01), STEPS, geometric(rate))
    np.testing.assert_allclose(factor, [ratio], rtol=1e-3)


def test_speedup_counts_what_is_charged():
    # The same curve with twice the gradients per step is half as fast.
    factor = speedups(STEPS, geometric(0.01), 2 * STEPS, geometric(0.01))
    np.testing.assert_allclose(factor, [0.5])
    never = speedups(STEPS, geometric(0.01), 2 * STEPS, geometric(1.0 - 0.99**0.5))
    np.testing.assert_allclose(never, [0.25], rtol=1e-3)


def test_speedup_is_paired_by_seed():
    theirs = np.concatenate([geometric(0.01), geometric(0.01, 50.0)])
    ours = np.concatenate([geometric(1 - 0.99**2), geometric(1 - 0.99**0.5, 50.0)])
    np.testing.assert_allclose(speedups(STEPS, theirs, STEPS, ours), [2.0, 0.5], rtol=1e-3)


def test_speedup_of_a_noisy_reference_against_itself_is_one():
    noise = np.random.default_rng(0).lognormal(0.0, 0.3, (25, 101))
    noisy = geometric(0.02) * noise
    np.testing.assert_array_equal(speedups(STEPS, noisy, STEPS, noisy), np.ones(25))
    other = speedups(STEPS, noisy, STEPS, geometric(0.02) * noise[::-1])
    assert 0.9 < np.median(other) < 1.1  # no gain from noise


def test_speedup_of_useless_runs():
    good, flat = geometric(0.01), np.ones((1, 101))
    broken, exploded = good.copy(), good.copy()
    broken[0, -1], exploded[0, -1] = np.nan, 1e30
    worse = 1.0 + 0.5 * np.linspace(0, 1, 101)[None]
    for useless in (broken, exploded, flat, worse):
        np.testing.assert_array_equal(speedups(STEPS, good, STEPS, useless), [0.0])
        np.testing.assert_array_equal(speedups(STEPS, useless, STEPS, good), [np.nan])


def test_loss_ratios():
    theirs = np.array([[9.0, 2.0], [9.0, 4.0], [9.0, np.nan]])
    ours = np.array([[9.0, 1.0], [9.0, np.nan], [9.0, 1.0]])
    np.testing.assert_array_equal(loss_ratios(theirs, ours), [0.5, np.inf, np.nan])


def test_speedup_against_a_published_curve():
    theirs = (np.array([0.0, 100, 200]), np.array([3.0, 2.0, 1.0]))
    ours = np.array([0.0, 25, 50])
    assert speedup_against(*theirs, ours, np.array([3.0, 1.7, 1.3])) == (150 / 50, False)
    assert speedup_against(*theirs, ours, np.array([3.0, 0.6, 0.4])) == (200 / 50, True)
    assert speedup_against(*theirs, ours, np.array([3.0, 3.4, 3.6])) == (0.0, False)
    assert speedup_against(*theirs, ours, np.array([3.0, 2.0, np.nan])) == (0.0, False)


def test_win_tie_loss_pairs_the_seeds():
    # Seeds differ far more than optimizers do; only the paired difference shows which is better.
    final = np.random.default_rng(0).lognormal(0.0, 2.0, (25, 1))
    both = lambda x: np.concatenate([np.full_like(x, 9.0), x], axis=1)
    noise = 0.01 * np.random.default_rng(1).normal(size=(25, 1))
    assert outcome(both(final), both(final - 0.1 + noise)) == "win"
    assert outcome(both(final), both(final + 0.1 + noise)) == "loss"
    assert outcome(both(final), both(final + noise - noise.mean())) == "tie"
    assert outcome(both(final), both(final)) == "tie"
    # As certain as it may be, a difference of less than 0.5% is none.
    assert outcome(both(final), both(0.996 * final)) == "tie"
    assert outcome(both(final), both(0.994 * final)) == "win"
    assert outcome(both(-final), both(-0.994 * final)) == "loss"


def test_a_run_that_is_not_finite_loses():
    good = np.ones((3, 2))
    bad = good.copy()
    bad[1, 1] = np.nan
    assert outcome(good, bad) == "loss" and outcome(bad, good) == "win"
    assert outcome(bad, bad) == "tie"
