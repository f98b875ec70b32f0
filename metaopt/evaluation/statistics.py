"""Statistics of curves over seeds, and of scores over tasks. Imports numpy and scipy only.

S is the number of seeds and M the number of measurements of a curve; the first measurement is taken
before the first step. A *cost* is what a run is charged for: optimizer steps, gradient evaluations
or seconds.

References:
  Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021,
  https://arxiv.org/abs/2108.13264 (interquartile mean, stratified bootstrap).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real
from scipy.stats import bootstrap, trim_mean

Outcome = Literal["win", "tie", "loss"]
AVERAGED = 3  # measurements that a final value is the mean of
TIED = 0.005  # of the reference's loss: tables show a smaller difference as a ratio of 1.00


class Interval(NamedTuple):
    """A mean with the ends of its interval, elementwise for arrays.

    Attributes:
      mean: the mean.
      low: the lower end, of a 95% confidence interval or of a range.
      high: the upper end.
    """

    mean: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]


class Speedup(NamedTuple):
    """A speed-up over a published curve.

    Attributes:
      factor: the speed-up.
      beyond: whether the published curve never reaches the loss, so that `factor` is only a lower
        bound.
    """

    factor: float
    beyond: bool


def final_mean(values: Real[np.ndarray, "*axes M"]) -> Float[np.ndarray, "*axes"]:
    """Final value of each curve: the mean over its last `AVERAGED` measurements.

    This rule defines every "final loss" and "final accuracy": in tables, aggregates, verdicts,
    model cards and the marked lines of figures. A single last measurement is too noisy: a spike of
    one seed out of eight in the last step of a run on spirals raised the mean test loss of tuned
    Adam from 0.013 to 0.023 (docs/results/digits).

    The measurement before the first step never counts. A curve with fewer than `AVERAGED`
    measurements after it is averaged over those.

    Args:
      values: curves along the last axis.

    Returns:
      One value per curve, not finite if one of the averaged measurements is not finite.
    """
    values = np.asarray(values, np.float64)
    number = min(AVERAGED, max(values.shape[-1] - 1, 1))
    with np.errstate(invalid="ignore"):  # inf - inf
        return np.asarray(values[..., -number:].mean(axis=-1))


def mean_interval(
    values: Real[np.ndarray, "S ..."], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean over seeds with a 95% percentile-bootstrap interval.

    Where one seed is not finite, the mean and the upper end are inf, so that a diverged run is
    never hidden.

    Args:
      values: one entry per seed along the first axis.
      resamples: number of bootstrap resamples.
      seed: seed of the bootstrap.
    """
    values = np.asarray(values, np.float64)
    diverged_somewhere = ~np.isfinite(values).all(axis=0)
    finite = np.where(diverged_somewhere, 0.0, values)
    mean = finite.mean(axis=0)
    if len(values) < 2 or np.ptp(finite, axis=0).max() == 0:
        low = high = mean
    else:
        weights = _resampling_weights(len(finite), resamples, seed)
        means = np.tensordot(finite, weights, axes=(0, 1))  # [..., resamples]
        low, high = np.quantile(means, (0.025, 0.975), axis=-1)
    return Interval(
        mean=np.where(diverged_somewhere, np.inf, mean),
        low=np.where(diverged_somewhere, np.nan, low),
        high=np.where(diverged_somewhere, np.inf, high),
    )


@lru_cache(maxsize=16)
def _resampling_weights(number: int, resamples: int, seed: int) -> np.ndarray:
    """Weight of each of `number` values in each bootstrap resample, ``[resamples, number]``.

    The means of all resamples are then one matrix product.
    """
    indices = np.random.default_rng(seed).integers(0, number, (resamples, number))
    return np.stack([np.mean(indices == i, axis=1) for i in range(number)], axis=1)


def min_max(values: Real[np.ndarray, "S ..."]) -> Interval:
    """Mean over seeds with the lowest and the highest seed, the band that LGL2O draws.

    Where one seed is not finite, the mean and the upper end are inf.
    """
    values = np.asarray(values, np.float64)
    with_inf = np.where(np.isfinite(values), values, np.inf)
    low = with_inf.min(axis=0)
    return Interval(
        mean=with_inf.mean(axis=0),
        low=np.where(np.isinf(low), np.nan, low),
        high=with_inf.max(axis=0),
    )


def iqm_interval(
    scores: Sequence[Real[np.ndarray, " _"]], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interquartile mean over all runs of all tasks, with a 95% stratified-bootstrap interval.

    The interquartile mean pools the scores of all tasks, drops the lowest and the highest quarter
    and averages the rest. The bootstrap resamples runs within each task, so the tasks themselves
    are treated as fixed. With a single run per task the interval has no width.

    Args:
      scores: one array per task, with one score per run; inf is allowed (a diverged run), NaN not.
      resamples: number of bootstrap resamples.
      seed: seed of the bootstrap.

    Raises:
      ValueError: when there is no task, a task has no score, or a score is NaN.
    """
    tasks = _clipped(scores)
    mean = low = high = _interquartile_mean(*tasks)
    if min(map(len, tasks)) > 1:
        result = bootstrap(
            tasks,
            _interquartile_mean,
            n_resamples=resamples,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(seed),
            batch=500,
        )
        low, high = result.confidence_interval
    return Interval(mean=_with_inf(mean), low=_with_inf(low), high=_with_inf(high))


def iqm(scores: Sequence[Real[np.ndarray, " _"]]) -> Float[np.ndarray, ""]:
    """The mean of `iqm_interval` alone."""
    return _with_inf(_interquartile_mean(*_clipped(scores)))


# Infinite scores are replaced by a huge one while they are averaged and interpolated. Its square is
# still finite, and a thousandth of it is still recognized.
_HUGE = 1e100


def _clipped(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    tasks = [np.asarray(task, np.float64) for task in scores]
    if not tasks or any(task.size == 0 or np.isnan(task).any() for task in tasks):
        raise ValueError(
            "iqm_interval: scores must hold at least one task, and at least one score and no NaN "
            "per task."
        )
    return [np.clip(task, -_HUGE, _HUGE) for task in tasks]


def _interquartile_mean(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
    return trim_mean(np.concatenate(columns, axis=axis), 0.25, axis=axis)


def _with_inf(value: np.ndarray) -> np.ndarray:
    return np.where(np.abs(value) > 1e-10 * _HUGE, np.copysign(np.inf, value), value)


def steps_to_reach(
    steps: Real[np.ndarray, " M"], mean_loss: Real[np.ndarray, " M"], target: float
) -> float:
    """First measured step at which the mean loss is at most `target`; inf if there is none."""
    reached = np.flatnonzero(np.asarray(mean_loss) <= target)
    return float(steps[reached[0]]) if reached.size else float("inf")


def cost_to_reach(
    cost: Real[np.ndarray, " M"], loss: Real[np.ndarray, " M"], target: float
) -> float:
    """Cost at which the lowest loss so far of a run reaches `target`; inf if it never does.

    The lowest loss so far is interpolated linearly between measurements.

    Args:
      cost: cost of the run at each measurement, increasing.
      loss: its loss there; a measurement that is not finite is skipped.
      target: the loss to reach.
    """
    loss = np.asarray(loss, np.float64)
    lowest = np.minimum.accumulate(np.where(np.isfinite(loss), loss, np.inf))
    reached = np.flatnonzero(lowest <= target)
    if not reached.size:
        return float("inf")
    i = reached[0]
    if i == 0 or not np.isfinite(lowest[i - 1]):
        return float(cost[i])
    fraction = (lowest[i - 1] - target) / (lowest[i - 1] - lowest[i])
    return float(cost[i - 1] + fraction * (cost[i] - cost[i - 1]))


def speedups(
    reference_cost: Real[np.ndarray, " R"],
    reference_loss: Real[np.ndarray, "S R"],
    cost: Real[np.ndarray, " M"],
    loss: Real[np.ndarray, "S M"],
) -> Float[np.ndarray, " S"]:
    """Speed-up of an optimizer over a reference, seed by seed.

    Let A be the reference's final loss (`final_mean`).

    - If the optimizer reaches A at cost t, the speed-up is r / t, where r is the cost at which the
      reference first reaches A.
    - Otherwise let B be the optimizer's lowest loss and s the cost at which the reference reaches
      B. The speed-up is s divided by the whole cost of the optimizer, which is at most 1 if both
      are charged the same.
    - The speed-up is 0 if the optimizer diverged or never improved on its start.

    The reference against itself is exactly 1. A noisy reference may reach A well before its end;
    counting from r and not from the end means that noise alone gains nothing.

    Args:
      reference_cost: cost of the reference at each of its R measurements, starting at 0.
      reference_loss: its loss.
      cost: cost of the optimizer at each measurement, starting at 0.
      loss: its loss; both runs of a seed start from the same params.

    Returns:
      One speed-up per seed; NaN where the reference itself diverged or ended no better than it
      started, so that there is nothing to compare with.
    """
    final = final_mean(reference_loss)
    useless = diverged(reference_loss) | (final >= reference_loss[:, 0])
    failed = diverged(loss)
    factors = []
    for seed, (theirs, ours) in enumerate(zip(reference_loss, loss, strict=True)):
        lowest = np.min(ours, where=np.isfinite(ours), initial=np.inf)
        own_cost = cost_to_reach(cost, ours, final[seed])
        if useless[seed]:
            factors.append(np.nan)
        elif failed[seed] or lowest >= ours[0]:
            factors.append(0.0)
        elif np.isfinite(own_cost) and own_cost > 0:
            factors.append(cost_to_reach(reference_cost, theirs, final[seed]) / own_cost)
        else:
            factors.append(cost_to_reach(reference_cost, theirs, lowest) / cost[-1])
    return np.array(factors, np.float64)


def loss_ratios(
    reference_loss: Real[np.ndarray, "S R"], loss: Real[np.ndarray, "S M"]
) -> Float[np.ndarray, " S"]:
    """Final loss divided by the reference's final loss, seed by seed.

    Returns:
      One ratio per seed: inf where the optimizer's final loss is not finite, NaN where the
      reference's is not.
    """
    theirs, ours = final_mean(reference_loss), final_mean(loss)
    ours = np.where(np.isfinite(ours), ours, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isfinite(theirs), ours / theirs, np.nan)


def speedup_against(
    reference_steps: Real[np.ndarray, " R"],
    reference_loss: Real[np.ndarray, " R"],
    steps: Real[np.ndarray, " M"],
    loss: Real[np.ndarray, " M"],
) -> Speedup:
    """Steps that a published curve needs to reach our final loss, divided by our steps.

    The published curve is interpolated linearly. If it never reaches our final loss, the factor is
    computed from its last step and is a lower bound (`Speedup.beyond`). The factor is 0 if our
    final loss is not finite or above the whole curve.

    Args:
      reference_steps: steps of the published curve.
      reference_loss: its loss at these steps.
      steps: steps of our measurements.
      loss: our loss, a mean over seeds.
    """
    final = float(final_mean(loss))
    if not np.isfinite(final):
        return Speedup(factor=0.0, beyond=False)
    needed = cost_to_reach(reference_steps, reference_loss, final)
    beyond = not np.isfinite(needed)
    return Speedup(float((reference_steps[-1] if beyond else needed) / steps[-1]), beyond)


def outcome(reference_loss: Real[np.ndarray, "S R"], loss: Real[np.ndarray, "S M"]) -> Outcome:
    """Whether an optimizer's final losses are lower than the reference's, paired by seed.

    Returns:
      "tie" if the 95% bootstrap interval of the mean paired difference contains 0, or if this mean
      is below `TIED` of the reference's mean final loss; otherwise "win" or "loss". If a run of
      only one of the two is not finite, that one loses; if both have such a run, it is a tie.
    """
    theirs, ours = final_mean(reference_loss), final_mean(loss)
    theirs_finite, ours_finite = np.isfinite(theirs).all(), np.isfinite(ours).all()
    if not (theirs_finite and ours_finite):
        if theirs_finite == ours_finite:
            return "tie"
        return "win" if ours_finite else "loss"
    difference = mean_interval(ours - theirs)
    is_small = abs(difference.mean) < TIED * abs(float(np.mean(theirs)))
    if is_small or difference.low <= 0 <= difference.high:
        return "tie"
    return "win" if difference.mean < 0 else "loss"


def diverged(loss: Real[np.ndarray, "S M"], *, factor: float = 2.0) -> Bool[np.ndarray, " S"]:
    """Which seeds diverged: their final loss is not finite or above `factor` times the first."""
    final = final_mean(loss)
    return ~np.isfinite(final) | (final > factor * loss[:, 0])


def divergence_rate(loss: Real[np.ndarray, "S M"], *, factor: float = 2.0) -> float:
    """Fraction of the seeds that `diverged`."""
    return float(np.mean(diverged(loss, factor=factor)))
