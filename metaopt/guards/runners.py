"""Guards as runners: several optimizers walk over the same mini-batches, then losses decide."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from metaopt.core.rollouts import step, unroll
from metaopt.core.types import Params
from metaopt.guards.core import Guard, Process, batch_losses, check_lengths, check_window


class Runs(NamedTuple):
    """All runners of one window.

    Attributes:
      points: the params of each of k runners.
      states: the state of each runner's transformation.
      losses: validation losses ``[k, C]``; in a stream C is the largest size, filled so far.
    """

    points: tuple[Params, ...]
    states: tuple[Any, ...]
    losses: Float[Array, "k C"]


def runner_guard(
    name: str,
    txs: Sequence[optax.GradientTransformation],
    init: Callable[[Params], Any],
    start: Callable[[Any, Params], tuple[Sequence[Params], Sequence[Any]]],
    decide: Callable[[Any, Params, Runs, Any], tuple[Params, Any]],
    *,
    n_t: int,
    n_c: int,
    max_scale: int = 1,
) -> Guard:
    """A guard whose window is n_t steps of each runner and n_c validation losses of each.

    Args:
      name: how messages call it.
      txs: one per-step transformation per runner.
      init: ``params -> state``; the state has a field ``info`` (`GuardInfo`).
      start: ``(state, params) -> points, states`` of the runners at the start of a window.
      decide: ``(state, params, runs, (n_t, n_c)) -> params, state`` at its end.
      n_t, n_c: mini-batches of a window.
      max_scale: windows may be up to this many times larger, at the ratio n_t : n_c.
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
        new_params, state = decide(state, params, Runs(points, states, losses), lengths)
        return optax.tree.sub(new_params, params), state

    def start_work(state, params):
        points, states = start(state, params)
        losses = jnp.zeros((len(txs), n_c * max_scale), jnp.result_type(float))
        return Runs(tuple(points), tuple(states), losses)

    def train(runs: Runs, index, value_fn):
        del index
        ends = [
            step(tx, point, inner_state, value_fn)[:2]
            for tx, point, inner_state in zip(txs, runs.points, runs.states, strict=True)
        ]
        points, states = zip(*ends, strict=True)
        return runs._replace(points=points, states=states)

    def validate(runs: Runs, index, value_fn):
        losses = jnp.stack([value_fn(point) for point in runs.points])
        return runs._replace(losses=runs.losses.at[:, index].set(losses.astype(runs.losses.dtype)))

    process = Process(
        start=start_work,
        phases=(train, validate),
        lengths=lambda state: jnp.stack([state.info.n_t, state.info.n_c]),
        decide=decide,
    )
    return Guard(init, update_fn, (n_t, n_c), process)
