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

SPREAD = 1.0  # standard deviation of the change of a log learning rate


class Found(NamedTuple):
    """The result of a search.

    Attributes:
      theta: the best one.
      loss: its loss on held-out runs.
      point: the arguments of `imitate` that it was made with, or {} where the given theta is best.
      losses: of all thetas that were tried, the given one first; inf where it was not finite.
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
) -> Found:
    """Looks for a start of meta-training: L3RS that takes the steps of one of its bases.

    The points are a grid of base optimizers, schedules and learning rates. Where theta tells layers
    apart, the second half of the points change the learning rates of some layers of the best point
    so far.

    Args:
      settings: of the L3RS.
      theta: its meta-parameters, which compete too.
      validate: ``(theta, key) -> loss``, e.g. of `metaopt.meta.validation`.
      key: for `validate`, the same for all points, and for the rates of layers.
      points: number of points, at least one for each base optimizer and schedule.

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
    k_layers, k_runs = jax.random.split(key)
    validate = validate if isinstance(validate, Partial) else Partial(validate)
    loss_of = jax.jit(lambda validate, theta, key: validate(theta, key))

    def made(point: dict[str, Any]) -> Theta:
        return imitate(settings, theta, **point) if point else theta

    results: list[tuple[float, dict[str, Any]]] = []

    def best() -> tuple[float, dict[str, Any]]:
        return min(results, key=lambda result: result[0])

    def judge(point: dict[str, Any]) -> None:
        loss = float(loss_of(validate, made(point), k_runs))
        results.append((loss if np.isfinite(loss) else np.inf, point))

    layers = layer_names_of(settings, theta)
    changes = points // 2 if len(layers) > 1 else 0
    per_pair = max((points - changes) // (len(rates) * len(SCHEDULES)), 1)
    judge({})
    for base, schedule in product(rates, SCHEDULES):
        low, high = rates[base]
        # The midpoints of equal parts of the range.
        for part in (np.arange(per_pair) + 0.5) / per_pair:
            rate = float(low * (high / low) ** part)
            judge({"base": base, "schedule": schedule, "lr": rate})
    if best()[1]:
        for move in _moves(k_layers, changes, len(layers)):
            point = best()[1]
            rate = point["lr"]
            so_far: dict[str, float] = (
                rate if isinstance(rate, dict) else {name: rate for name in layers}
            )
            moved = {name: so_far[name] * float(m) for name, m in zip(layers, move, strict=True)}
            judge({**point, "lr": moved})
    loss, point = best()
    return Found(made(point), loss, point, [result[0] for result in results])


def _moves(key: Key, number: int, layers: int) -> np.ndarray:
    """Factors of learning rates ``[number, layers]``; half of them, at random, are 1."""
    k_which, k_how_far = jax.random.split(key)
    moves = SPREAD * np.asarray(jax.random.normal(k_how_far, (number, layers)))
    return np.exp(np.where(jax.random.bernoulli(k_which, 0.5, moves.shape), moves, 0.0))
