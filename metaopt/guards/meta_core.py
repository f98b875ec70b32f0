"""What SMG and AMG share, whichever way they are driven: pairs, runs and the decision."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.core.trees import all_finite
from metaopt.core.types import LearnedOptimizer, Params, Theta
from metaopt.guards.core import became_nonfinite, record, score, select

Objective = Literal["next", "validation"]


class Pair(NamedTuple):
    """What a Meta Guard optimizes: params and meta-parameters together."""

    params: Params
    theta: Theta


class Method(NamedTuple):
    """In what SMG and AMG differ.

    Attributes:
      name: how messages call it.
      propose: ``(ahead, loss, start, rates) -> learned, fallback, used_gradient``, where
        ``ahead(pair) -> loss on C after T steps, pair after T steps``, and ``loss(params)``
        is the loss on C (on V, where that is the objective).
      unrolled: ``(learned, fallback) -> pairs`` that take T more steps on B2.
      candidates: ``(start, learned, fallback, ends) -> pairs, points``: what can be kept, and the
        params at which each is judged.
      pick: scores (finite or +inf) -> index of the candidate to keep.
      num_candidates, gradients, losses: how many there are; what a window costs.
    """

    name: str
    propose: Callable[..., tuple[Pair, Pair, jax.Array]]
    unrolled: Callable[[Pair, Pair], tuple[Pair, ...]]
    candidates: Callable[..., tuple[tuple[Pair, ...], tuple[Params, ...]]]
    pick: Callable[[jax.Array], jax.Array]
    num_candidates: int
    gradients: int
    losses: int


class Run(NamedTuple):
    """The learned optimizer on its way: params, theta (fixed) and the transformation's state."""

    params: Params
    theta: Theta
    memory: Any


class Setting(NamedTuple):
    """One Meta Guard: a `Method` and the user's options; see `smg`."""

    method: Method
    learned: LearnedOptimizer
    make: Callable[[Theta], optax.GradientTransformationExtraArgs]
    make_state: Callable[..., Any]
    n_t: int
    n_c: int
    rates: Pair
    second_order: bool
    objective: Objective


def begin(setting: Setting, pair: Pair) -> Run:
    return Run(pair.params, pair.theta, setting.make(pair.theta).init(pair.params))


def end(setting: Setting, run: Run) -> Pair:
    return Pair(run.params, setting.learned.absorb(run.theta, run.memory))


def decide(setting: Setting, state, params, proposals, ends, losses) -> tuple[Params, Any]:
    """Keeps one pair, given the validation losses ``[candidates, n_c]``."""
    method, start = setting.method, Pair(params, state.theta)
    learned, fallback, used_gradient = proposals
    ends = tuple(end(setting, run) for run in ends)
    pairs, points = method.candidates(start, learned, fallback, ends)
    mask = jnp.ones(setting.n_c, bool)
    scores = []
    for pair, point, loss in zip(pairs, points, losses, strict=True):
        broken = became_nonfinite(start.theta, pair.theta) | ~all_finite(pair.params)
        scores.append(jnp.where(broken, jnp.inf, score(loss, mask, point)))
    scores = jnp.stack(scores)
    kept_start = ~jnp.any(jnp.isfinite(scores[:3]))  # all proposals; AMG's 3 is the start
    winner = jnp.where(jnp.any(jnp.isfinite(scores)), method.pick(scores), -1)
    kept = select(winner, pairs, start)
    info = record(
        state.info,
        winner,
        winner == 0,
        scores,
        kept_start,
        gradients=method.gradients,
        losses=method.losses,
    )
    return kept.params, setting.make_state(kept.theta, used_gradient, info)


def points_of(setting: Setting, start: Pair, proposals, ends) -> tuple[Params, ...]:
    """The params at which the candidates are judged."""
    ends = tuple(end(setting, run) for run in ends)
    return setting.method.candidates(start, *proposals[:2], ends)[1]
