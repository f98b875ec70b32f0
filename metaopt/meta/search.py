"""A search for the theta that L3RS is meta-trained from: its best base optimizer, well tuned."""

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from metaopt.core.checks import check_integer
from metaopt.core.types import Key, Theta
from metaopt.optimizers import BASES, L3RS, imitate
from metaopt.optimizers.imitation import SCHEDULES, layer_names_of

# Standard deviations of a change of a point: of log learning rates of layers; of the log learning
# rate of all; of the powers of `imitate`; of constants of a base, which are logits and logarithms.
SPREAD, RATE_SPREAD, POWER_SPREAD, CONSTANT_SPREAD = 1.0, 0.5, 0.2, 0.7
HORIZON_POWER = -0.5  # to begin with; see `imitate`


class Found(NamedTuple):
    """The result of a search.

    Attributes:
      theta: the best one.
      loss: its mean loss on held-out runs.
      point: the arguments of `imitate` that it was made with, or {} where the given theta is best.
      losses: mean losses of all thetas that were tried, the given one first; inf where one was not
        finite.
    """

    theta: Theta
    loss: float
    point: dict[str, Any]
    losses: list[float]


def search(
    settings: L3RS,
    theta: Theta,
    validate: Callable[[Theta, Key], jax.Array],
    key: Key,
    *,
    points: int = 64,
    any_horizon: bool = False,
    after_each: Callable[[float], None] | None = None,
) -> Found:
    """Looks for a start of meta-training: L3RS that takes the steps of one of its bases.

    The first half of the points are a grid of base optimizers, schedules and learning rates. The
    second half change the best point so far: the learning rates of some layers, where theta tells
    layers apart; else the learning rate, how it falls with the horizon and with the size of a
    layer, and the constants of the base optimizer.

    Args:
      settings: of the L3RS.
      theta: its meta-parameters, which compete too.
      validate: ``(theta, key) -> loss``, e.g. of `metaopt.meta.validation`; or losses ``[C]`` of
        several kinds of runs. The best point has the least mean regret: the loss less that of the
        best point for the same kind of runs. Regrets count by their tanh, so that no kind decides
        alone.
      key: for `validate`, the same for all points, and for the changes.
      points: number of points, at least one for each base optimizer and schedule.
      any_horizon: the kinds of runs differ in length, so that the learning rate may depend on it.
      after_each: called with the mean loss of each point after it, e.g. to show progress.

    Returns:
      The best theta, and how it was found.

    Raises:
      ValueError: when `points` is too small, or no base has a learning rate.
    """
    rates = {name: limits for name in settings.base if (limits := BASES[name].rates)}
    if not rates:
        raise ValueError(
            f"search: none of the bases {', '.join(settings.base)} is an optimizer by itself; add "
            "one, for example adam."
        )
    check_integer("search: points", points, len(rates) * len(SCHEDULES))
    k_changes, k_runs = jax.random.split(key)
    validate = validate if isinstance(validate, Partial) else Partial(validate)
    loss_of = jax.jit(lambda validate, theta, key: validate(theta, key))

    def made(point: dict[str, Any]) -> Theta:
        return imitate(settings, theta, **point) if point else theta

    tried: list[dict[str, Any]] = []
    losses: list[np.ndarray] = []
    means: list[float] = []

    def judge(point: dict[str, Any]) -> None:
        loss = np.atleast_1d(np.asarray(loss_of(validate, made(point), k_runs)))
        tried.append(point)
        losses.append(loss)
        means.append(float(np.mean(loss)) if np.all(np.isfinite(loss)) else np.inf)
        if after_each:
            after_each(means[-1])

    def best() -> int:
        return int(np.argmin(_mean_regrets(np.stack(losses))))

    layers = layer_names_of(settings, theta)
    # One layer has no rate beside that of all.
    changes = points // 2 if len(layers) > 1 or settings.variant == "none" else 0
    per_pair = max((points - changes) // (len(rates) * len(SCHEDULES)), 1)
    powers = {"horizon_power": HORIZON_POWER} if any_horizon else {}
    judge({})
    for base, schedule in product(rates, SCHEDULES):
        low, high = rates[base]
        # The midpoints of equal parts of the range.
        for part in (np.arange(per_pair) + 0.5) / per_pair:
            rate = float(low * (high / low) ** part)
            judge({"base": base, "schedule": schedule, "lr": rate, **powers})
    if tried[best()]:
        for k_change in jax.random.split(k_changes, changes):
            point = tried[best()]
            if layers:
                judge({**point, "lr": _other_rates(k_change, point["lr"], layers)})
            else:
                constants = {name: float(x) for name, x in theta["base"][point["base"]].items()}
                judge(_changed(k_change, point, constants))
    index = best()
    return Found(made(tried[index]), means[index], tried[index], means)


def _mean_regrets(losses: np.ndarray) -> np.ndarray:
    """Mean regrets of points, by their tanh, from losses ``[points, kinds of runs]``.

    A point with a loss that is not finite has regret infinity.
    """
    finite = np.all(np.isfinite(losses), axis=1)
    if not finite.any():
        return np.full(len(losses), np.inf)
    regrets = np.tanh(losses[finite] - np.min(losses[finite], axis=0))
    result = np.full(len(losses), np.inf)
    result[finite] = np.mean(regrets, axis=1)
    return result


def _changes(key: Key, spreads: np.ndarray) -> np.ndarray:
    """Random numbers of these standard deviations ``[n]``; half of them, at random, are 0."""
    k_which, k_how_far = jax.random.split(key)
    numbers = spreads * np.asarray(jax.random.normal(k_how_far, spreads.shape))
    return np.where(jax.random.bernoulli(k_which, 0.5, spreads.shape), numbers, 0.0)


def _other_rates(key: Key, rate: float | dict[str, float], layers: list[str]) -> dict[str, float]:
    """Other learning rates of some layers."""
    rates = rate if isinstance(rate, dict) else dict.fromkeys(layers, rate)
    factors = np.exp(_changes(key, np.full(len(layers), SPREAD)))
    return {name: rates[name] * float(x) for name, x in zip(layers, factors, strict=True)}


def _changed(key: Key, point: dict[str, Any], constants: dict[str, float]) -> dict[str, Any]:
    """Another point near `point`; `constants` are those of its base optimizer by default."""
    constants = constants | point.get("constants", {})
    powers = {"norm_power": point.get("norm_power", 1.0)}
    if "horizon_power" in point:
        powers["horizon_power"] = point["horizon_power"]
    spreads = [RATE_SPREAD, *[POWER_SPREAD] * len(powers), *[CONSTANT_SPREAD] * len(constants)]
    rate, *others = _changes(key, np.array(spreads)).tolist()
    moved_powers = {name: x + others.pop(0) for name, x in powers.items()}
    moved = {name: x + others.pop(0) for name, x in constants.items()}
    lr = point["lr"] * float(np.exp(rate))
    return {**point, "lr": lr, **moved_powers, "constants": moved}
