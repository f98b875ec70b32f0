"""Summaries of curves over seeds, and of seeds over tasks. Imports numpy and scipy only.

S seeds, M measurements after the one at the start. A *cost* is whatever a run is charged with:
optimizer steps, gradient evaluations or seconds.

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


class Interval(NamedTuple):
    """Attributes: mean; low, high: its 95% bootstrap confidence interval, or the range."""

    mean: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]


class Speedup(NamedTuple):
    """Attributes: factor; beyond: the reference never gets there, so that factor is a bound."""

    factor: float
    beyond: bool


def final_mean(values: Float[np.ndarray, "... M+1"]) -> Float[np.ndarray, "..."]:
    """The final value of each curve: the mean over its last `AVERAGED` measurements.

    This is the one rule for every "final loss" and "final accuracy": tables, verdicts, model cards,
    aggregates and the lines in figures. A single last measurement is not enough: a spike of one
    seed of eight in the last step of a run on spirals had nearly doubled Adam's mean test loss
    (0.023 instead of 0.013; docs/results/digits). A shorter curve is averaged over all measurements
    but the one at the start. The mean is not finite if any averaged measurement is not.
    """
    values = np.asarray(values, np.float64)
    number = min(AVERAGED, max(values.shape[-1] - 1, 1))
    with np.errstate(invalid="ignore"):  # inf - inf
        return values[..., -number:].mean(axis=-1)


def mean_interval(
    values: Float[np.ndarray, "S ..."], *, resamples: int = 2000, seed: int = 0
) -> Interval:
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
        shares = _shares(len(finite), resamples, seed)
        means = np.tensordot(finite, shares, axes=(0, 1))  # [..., resamples]
        low, high = np.quantile(means, (0.025, 0.975), axis=-1)
    with_inf = lambda x: np.where(broken, np.inf, x)
    return Interval(with_inf(mean), np.where(broken, np.nan, low), with_inf(high))


@lru_cache(maxsize=16)
def _shares(number: int, resamples: int, seed: int) -> np.ndarray:
    """The share of each of so many values in each resample, ``[resamples, number]``.

    A mean of a resample is then a product of matrices, whatever is averaged.
    """
    drawn = np.random.default_rng(seed).integers(0, number, (resamples, number))
    return np.stack([np.mean(drawn == i, axis=1) for i in range(number)], axis=1)


def min_max(values: Float[np.ndarray, "S ..."]) -> Interval:
    """Mean over the first axis (seeds) with the lowest and the highest seed, as LGL2O draws it.

    Where any seed is not finite, mean and upper end are inf.
    """
    values = np.asarray(values, np.float64)
    broken = ~np.isfinite(values)
    low = np.where(broken, np.inf, values).min(axis=0)
    high = np.where(broken, np.inf, values).max(axis=0)
    mean = np.where(broken, np.inf, values).mean(axis=0)
    return Interval(mean, np.where(np.isinf(low), np.nan, low), high)


def iqm_interval(
    scores: Sequence[Float[np.ndarray, " runs"]], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interquartile mean over all runs of all tasks, with a 95% stratified-bootstrap interval.

    The mean of the middle half of all scores: runs and tasks in one bag, the lowest and the
    highest quarter dropped. The bootstrap draws runs with replacement within each task, so that
    the tasks themselves count as given. With a single run per task the interval has no width.

    Args:
      scores: one array per task, with one score per run; inf is allowed (a diverged run), NaN not.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: if there is no score, or one is NaN.
    """
    tasks = [np.asarray(task, np.float64) for task in scores]
    if not tasks or any(task.size == 0 or np.isnan(task).any() for task in tasks):
        raise ValueError("iqm_interval: scores must hold a task, and no empty or NaN one.")
    # An infinite score stays one that can be averaged and interpolated, and comes back as inf.
    huge = 1e100  # its square is still finite, and a thousandth of it still told apart
    tasks = [np.clip(task, -huge, huge) for task in tasks]
    back = lambda x: np.where(np.abs(x) > 1e90, np.copysign(np.inf, x), x)

    def iqm(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        return trim_mean(np.concatenate(columns, axis=axis), 0.25, axis=axis)

    mean = low = high = iqm(*tasks)
    if min(map(len, tasks)) > 1:
        result = bootstrap(
            tasks, iqm, n_resamples=resamples, method="percentile", vectorized=True,
            rng=np.random.default_rng(seed), batch=500,
        )  # fmt: skip
        low, high = result.confidence_interval
    return Interval(back(mean), back(low), back(high))


def steps_to_reach(
    steps: Real[np.ndarray, " M+1"], mean_loss: Float[np.ndarray, " M+1"], target: float
) -> float:
    """The first measured step whose mean loss is at most `target`; inf if there is none."""
    reached = np.flatnonzero(np.asarray(mean_loss) <= target)
    return float(steps[reached[0]]) if reached.size else float("inf")


def cost_to_reach(
    cost: Real[np.ndarray, " M+1"], loss: Float[np.ndarray, " M+1"], target: float
) -> float:
    """The cost at which a run's lowest loss so far comes down to `target`; inf if never.

    Linear between measurements. Arguments `cost` and `loss` are ``[M + 1]``; a loss that is not
    finite reaches nothing.
    """
    loss = np.asarray(loss, np.float64)
    lowest = np.minimum.accumulate(np.where(np.isfinite(loss), loss, np.inf))
    reached = np.flatnonzero(lowest <= target)
    if not reached.size:
        return float("inf")
    i = reached[0]
    if i == 0 or not np.isfinite(lowest[i - 1]):
        return float(cost[i])
    share = (lowest[i - 1] - target) / (lowest[i - 1] - lowest[i])
    return float(cost[i - 1] + share * (cost[i] - cost[i - 1]))


def speedups(
    reference_cost: Real[np.ndarray, " M+1"],
    reference_loss: Float[np.ndarray, "S M+1"],
    cost: Real[np.ndarray, " M+1"],
    loss: Float[np.ndarray, "S M+1"],
) -> Float[np.ndarray, " S"]:
    """How many times cheaper than a reference's runs an optimizer's runs get to the same loss.

    Per seed, with both runs on the same seed: if the optimizer comes down to the reference's final
    loss at cost t, the factor is (cost at which the reference came down to it) / t. Otherwise it is
    (cost at which the reference came down to the optimizer's best loss) / (whole cost of the
    optimizer), which is at most 1 if both are charged the same; 0 if the optimizer diverged or
    never got better than its start. With optimizer steps as cost, equal lengths T and a reference
    that falls to the end: T / t, or t_reference / T. A noisy reference comes down to its final
    loss before T, and counts from there: against itself it is exactly 1.

    Args:
      reference_cost, cost: ``[M + 1]``, from 0 upwards.
      reference_loss, loss: ``[S, M + 1]``.

    Returns:
      ``[S]``; NaN where the reference itself diverged or ended no better than it started, so that
      there is nothing to compare with.
    """
    lost = diverged(loss)
    useless = diverged(reference_loss)
    final = final_mean(reference_loss)
    factors = []
    for seed, (theirs, ours) in enumerate(zip(reference_loss, loss, strict=True)):
        best = np.min(ours, where=np.isfinite(ours), initial=np.inf)
        spent = cost_to_reach(cost, ours, final[seed])
        if useless[seed] or final[seed] >= theirs[0]:
            factors.append(np.nan)
        elif lost[seed] or best >= ours[0]:
            factors.append(0.0)
        elif np.isfinite(spent) and spent > 0:
            factors.append(cost_to_reach(reference_cost, theirs, final[seed]) / spent)
        else:
            factors.append(cost_to_reach(reference_cost, theirs, best) / cost[-1])
    return np.array(factors, np.float64)


def loss_ratios(
    reference_loss: Float[np.ndarray, "S M+1"], loss: Float[np.ndarray, "S M+1"]
) -> Float[np.ndarray, " S"]:
    """Final loss over the reference's on the same seed, ``[S, M + 1] -> [S]``.

    Inf where the optimizer's is not finite, NaN where the reference's is not.
    """
    theirs, ours = final_mean(reference_loss), final_mean(loss)
    ours = np.where(np.isfinite(ours), ours, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isfinite(theirs), ours / theirs, np.nan)


def speedup_against(
    reference_steps: Real[np.ndarray, " N"],
    reference_loss: Float[np.ndarray, " N"],
    steps: Real[np.ndarray, " M+1"],
    loss: Float[np.ndarray, " M+1"],
) -> Speedup:
    """Steps that a published curve needs for our final loss, over our steps.

    Linear between the points of the curve. Where our final loss is below all of the curve, the
    factor is that of the curve's last step: a lower bound, marked `beyond`. 0 if our final loss is
    not finite or above all of the curve. Arguments are ``[N]`` and ``[N]``; ``[M + 1]`` and
    ``[M + 1]`` (a mean over seeds).
    """
    final = float(final_mean(loss))
    if not np.isfinite(final):
        return Speedup(0.0, False)
    needed = cost_to_reach(reference_steps, reference_loss, final)
    beyond = not np.isfinite(needed)
    return Speedup(float((reference_steps[-1] if beyond else needed) / steps[-1]), beyond)


def outcome(
    reference_loss: Float[np.ndarray, "S M+1"], loss: Float[np.ndarray, "S M+1"]
) -> Outcome:
    """Whether final losses are lower than the reference's over the same seeds, ``[S, M + 1]``.

    A tie: the 95% bootstrap interval of the mean paired difference contains 0. A run that is not
    finite loses against one that is.
    """
    theirs, ours = final_mean(reference_loss), final_mean(loss)
    broken = np.array([(~np.isfinite(x)).any() for x in (theirs, ours)])
    if broken.any():
        return "tie" if broken.all() else "loss" if broken[1] else "win"
    difference = mean_interval(ours - theirs)
    if difference.low <= 0 <= difference.high:
        return "tie"
    return "win" if difference.mean < 0 else "loss"


def diverged(loss: Float[np.ndarray, "S M+1"], *, factor: float = 2.0) -> Bool[np.ndarray, " S"]:
    """Which seeds' final loss ``[S, M + 1]`` is not finite or above `factor` x the initial."""
    final = final_mean(loss)
    return ~np.isfinite(final) | (final > factor * loss[:, 0])


def divergence_rate(loss: Float[np.ndarray, "S M+1"], *, factor: float = 2.0) -> float:
    """Share of seeds that `diverged`."""
    return float(np.mean(diverged(loss, factor=factor)))
