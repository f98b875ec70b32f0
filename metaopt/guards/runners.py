"""Guards with runners: several optimizers step on the same mini-batches, then losses decide."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from metaopt.core.rollouts import step, unroll
from metaopt.core.types import Params
from metaopt.guards.core import (
    Guard,
    Process,
    batch_losses,
    check_lengths,
    check_window,
    score,
)


class Runners(NamedTuple):
    """The k runners of one window.

    Attributes:
      points: params of each runner.
      states: state of each runner's transformation.
      losses: validation losses ``[k, C]``. In a stream, C is the largest size of a window and
        only the first losses of a row are set.
    """

    points: tuple[Params, ...]
    states: tuple[Any, ...]
    losses: Float[Array, "k C"]


def scores(runners: Runners, mask: Bool[Array, " C"]) -> jax.Array:
    """Returns the `score` ``[k]`` of each runner over the losses that `mask` selects."""
    pairs = zip(runners.losses, runners.points, strict=True)
    return jnp.stack([score(losses, mask, point) for losses, point in pairs])


def runner_guard(
    name: str,
    txs: Sequence[optax.GradientTransformation],
    *,
    init: Callable[[Params], Any],
    start: Callable[[Any, Params], tuple[Sequence[Params], Sequence[Any]]],
    decide: Callable[[Any, Params, Runners, Any], tuple[Params, Any]],
    n_t: int,
    n_c: int,
    max_scale: int = 1,
) -> Guard:
    """Makes a guard whose window is n_t steps of each runner, then n_c validation losses of each.

    Args:
      name: name of the guard in error messages.
      txs: one per-step transformation per runner.
      init: ``params -> state``; the state has a field `info` (`GuardInfo`).
      start: ``(state, params) -> (points, states)`` of the runners at the start of a window.
      decide: ``(state, params, runners, (n_t, n_c)) -> (params, state)`` at the end of a window.
      n_t: training mini-batches of the smallest window.
      n_c: validation mini-batches of the smallest window.
      max_scale: a window may be up to this many times larger, at the ratio n_t : n_c.

    Returns:
      The guard, in window form and as a `Process`.
    """

    def update_fn(
        updates,
        state,
        params=None,
        *,
        loss_fn: Any = None,
        train_batches=None,
        eval_batches=None,
        **extra_args,
    ):
        del extra_args
        lengths = check_window(name, updates, params, loss_fn, train_batches, eval_batches)
        scale = min(max(lengths[0] // n_t, 1), max_scale)
        check_lengths(name, lengths, (scale * n_t, scale * n_c))
        ends = [
            unroll(tx, point, inner_state, loss_fn, train_batches)[:2]
            for tx, point, inner_state in zip(txs, *start(state, params), strict=True)
        ]
        points, states = zip(*ends, strict=True)
        losses = jnp.stack([batch_losses(loss_fn, point, eval_batches) for point in points])
        new_params, state = decide(state, params, Runners(points, states, losses), lengths)
        return optax.tree.sub(new_params, params), state

    def start_runners(state, params):
        points, states = start(state, params)
        losses = jnp.zeros((len(txs), n_c * max_scale), jnp.result_type(float))
        return Runners(tuple(points), tuple(states), losses)

    def train(runners: Runners, index, value_fn):
        del index
        ends = [
            step(tx, point, inner_state, value_fn)[:2]
            for tx, point, inner_state in zip(txs, runners.points, runners.states, strict=True)
        ]
        points, states = zip(*ends, strict=True)
        return runners._replace(points=points, states=states)

    def validate(runners: Runners, index, value_fn):
        losses = jnp.stack([value_fn(point) for point in runners.points])
        losses = losses.astype(runners.losses.dtype)
        return runners._replace(losses=runners.losses.at[:, index].set(losses))

    process = Process(
        start=start_runners,
        phases=(train, validate),
        lengths=lambda state: jnp.stack([state.info.n_t, state.info.n_c]),
        decide=decide,
    )
    return Guard(init, update_fn, window=(n_t, n_c), process=process)
