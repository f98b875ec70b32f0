"""Summaries of curves over seeds. Imports numpy and scipy only."""

from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap


class Interval(NamedTuple):
    """Attributes: mean; low, high: 95% bootstrap confidence interval of the mean."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_interval(values: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean over the first axis (seeds) with a 95% percentile-bootstrap interval.

    Where any seed is not finite, mean and upper end are inf: a diverged run is never hidden.
    """
    values = np.asarray(values, np.float64)
    broken = ~np.isfinite(values).all(axis=0)
    finite = np.where(broken, 0.0, values)
    mean = finite.mean(axis=0)
    if len(values) < 2 or np.ptp(finite, axis=0).max() == 0:
        low = high = mean
    else:
        result = bootstrap(
            (finite,), np.mean, axis=0, n_resamples=resamples, method="percentile",
            vectorized=True, rng=np.random.default_rng(seed), batch=200,
        )  # fmt: skip
        low, high = result.confidence_interval
    with_inf = lambda x: np.where(broken, np.inf, x)
    return Interval(with_inf(mean), np.where(broken, np.nan, low), with_inf(high))


def steps_to_reach(steps: np.ndarray, mean_loss: np.ndarray, target: float) -> float:
    """The first measured step whose mean loss is at most `target`; inf if there is none."""
    reached = np.flatnonzero(np.asarray(mean_loss) <= target)
    return float(steps[reached[0]]) if reached.size else float("inf")


def divergence_rate(loss: np.ndarray, *, factor: float = 2.0) -> float:
    """Share of seeds whose final loss ``[S, W]`` is not finite or above `factor` x the initial."""
    loss = np.asarray(loss)
    worse = ~np.isfinite(loss[:, -1]) | (loss[:, -1] > factor * loss[:, 0])
    return float(np.mean(worse))
