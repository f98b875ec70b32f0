"""Our own guard: the fallback runs alone, the learned optimizer races it, the lower is kept."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.core.checks import check_choice
from metaopt.core.types import Params
from metaopt.guards.core import (
    Guard,
    GuardInfo,
    check_sizes,
    inner,
    keep_counts,
    new_info,
    record,
    score,
    select,
    without_new_nan,
)
from metaopt.guards.runners import Runs, runner_guard


class RaceState(NamedTuple):
    """The runners.

    Attributes:
      learned: memory of the learned optimizer.
      points: params of each fallback's own run, then of each jumping run.
      fallbacks: states of these.
      info: diagnostics; candidate 0 is the learned one, then these in order.
    """

    learned: Any
    points: tuple[Params, ...]
    fallbacks: tuple[Any, ...]
    info: GuardInfo


def race(
    learned: optax.GradientTransformation,
    *fallbacks: optax.GradientTransformation,
    n_t: int = 10,
    n_c: int = 10,
    on_loss: Literal["carry", "rollback", "reset"] = "carry",
    jumps: bool = False,
) -> Guard:
    r"""Race: every fallback runs on its own; the best of them and the learned one is kept.

    .. math:: z^i_{k+1} = \text{fallback}_i^{n_t}(z^i_k), \quad
       y = \text{learned}^{n_t}(x_k), \quad
       x_{k+1} = \arg\min_{p \in \{z^1_{k+1}, \dots, y\}} \bar F(p), \quad z^i_0 = x_0

    with :math:`\bar F` the mean loss over `eval_batches`. A tie goes to a fallback, the first of
    them. Nothing that the learned optimizer does reaches a :math:`z^i`: it is, bit for bit, the run
    without a guard on the same training mini-batches. So at every decision the kept point is no
    worse, on the validation mini-batches, than any of these runs; and it converges wherever one
    of them does (docs/guards/race.md has the theorem). A candidate counts as +inf unless its loss
    and params are finite; where none is, x_k stays and `info.kept_start` counts it.

    Args:
      learned: per-step transformation, started from the kept point in every window. It gets
        optax's own extra args `value`, `grad`, `value_fn`. To nest a guard: `streaming(guard)`.
      *fallbacks: at least one per-step transformation.
      n_t, n_c: training and validation mini-batches of a window.
      on_loss: memory of `learned` after a window that it lost, i.e. when it goes on from another
        point than its own: as it is, as before the window, or initial. Step counts (fields named
        ``count``, not beside moments ``mu``) are never taken back; a memory that is not finite is
        never kept.
      jumps: adds a second run of every fallback, which jumps to the kept point after 1, 2, 4, 8,
        ... windows, and so goes on from what the learned optimizer has won. The first runs, and
        the promise, stay as they are.

    Returns:
      A guard; ``update(None, state, params, *, loss_fn, train_batches, eval_batches)`` with batch
      axes ``[n_t, ...]`` and ``[n_c, ...]``. With k fallbacks it costs (k + 1) n_t gradients and
      (k + 1) n_c losses, and keeps k more copies of the params. (With `jumps`, k counts twice.)

    Raises:
      ValueError: no fallback, an option out of range; `params`, `loss_fn` or batches missing,
        `updates` given, or windows of another size.

    Examples:
      >>> guard = race(optax.lion(1e-2), optax.adam(1e-3), n_t=5, n_c=2)
      >>> guard.window  # mini-batches for `metaopt.windows`
      (5, 2)

    References: ours; docs/guards/race.md.
    """
    check_sizes("race", n_t, n_c)
    if not fallbacks:
        raise ValueError("race: give at least one fallback: race(learned, fallback).")
    check_choice("race: on_loss", on_loss, ("carry", "rollback", "reset"))
    tx = inner("race", "learned", learned)
    plain = tuple(inner("race", f"fallback {i}", fallback) for i, fallback in enumerate(fallbacks))
    txs = plain * 2 if jumps else plain

    def init_fn(params):
        return RaceState(
            learned=tx.init(params),
            points=tuple(jax.tree.map(jnp.array, params) for _ in txs),
            fallbacks=tuple(fallback.init(params) for fallback in txs),
            info=new_info(1 + len(txs), n_t, n_c),
        )

    def start(state: RaceState, params):
        windows = state.info.windows
        jump = (windows & (windows - 1)) == 0  # a power of two (or the start, where all agree)
        jumping = [optax.tree.where(jump, params, point) for point in state.points[len(plain) :]]
        points = (params, *state.points[: len(plain)], *jumping)
        return points, (state.learned, *state.fallbacks)

    def decide(state: RaceState, params, runs: Runs, lengths):
        mask = jnp.arange(runs.losses.shape[1]) < lengths[1]
        scores = jnp.stack(
            [
                score(losses, mask, point)
                for losses, point in zip(runs.losses, runs.points, strict=True)
            ]
        )
        best = 1 + jnp.argmin(scores[1:])
        accepted = scores[0] < scores[best]
        kept_start = ~jnp.any(jnp.isfinite(scores))
        winner = jnp.where(kept_start, -1, jnp.where(accepted, 0, best))
        new_params = select(winner, runs.points, params)

        before = keep_counts(state.learned, runs.states[0])
        memory = without_new_nan(runs.states[0], before)
        lost = {
            "carry": lambda: memory,
            "rollback": lambda: before,
            "reset": lambda: keep_counts(tx.init(new_params), memory),
        }[on_loss]()
        runners = 1 + len(txs)
        info = record(
            state.info,
            winner,
            accepted,
            scores,
            kept_start,
            gradients=runners * lengths[0],
            losses=runners * lengths[1],
        )
        return new_params, RaceState(
            learned=optax.tree.where(accepted, memory, lost),
            points=runs.points[1:],
            fallbacks=runs.states[1:],
            info=info,
        )

    return runner_guard("race", (tx, *txs), init_fn, start, decide, n_t=n_t, n_c=n_c)
