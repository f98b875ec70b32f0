"""The race, our own guard: fallbacks run alone, the learned optimizer races them, the best wins."""

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
    init_info,
    inner_transformation,
    keep_counts,
    keep_finite,
    record_decision,
    select,
)
from metaopt.guards.runners import Runners, runner_guard, scores


class RaceState(NamedTuple):
    """State of `race`, with k runs of fallbacks: the plain ones, then the jumping ones.

    Attributes:
      learned: state of the learned transformation.
      points: params of each of the k runs.
      fallbacks: state of each of the k runs.
      info: diagnostics. Candidate 0 is that of the learned transformation, then follow the runs.
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
    on_reject: Literal["advance", "rollback", "reset"] = "advance",
    jumps: bool = False,
) -> Guard:
    r"""Race: keeps the best of the learned optimizer and of fallbacks that run on their own.

    .. math:: z^i_{k+1} = \text{fallback}_i^{n_t}(z^i_k), \quad
       y_{k+1} = \text{learned}^{n_t}(x_k), \quad
       x_{k+1} = \arg\min_{p \in \{z^1_{k+1}, \dots, y_{k+1}\}} \bar F(p), \quad z^i_0 = x_0

    where the exponent :math:`n_t` means that many steps and :math:`\bar F` is the mean loss over
    `eval_batches`. A tie goes to the first of the best fallbacks. A candidate counts as +inf unless
    its loss and params are finite. When none is, :math:`x_k` stays and `info.kept_start` counts it.

    Nothing that the learned optimizer does reaches a :math:`z^i`. It is, bit for bit, the run of
    the fallback without a guard on the same training mini-batches. So at every decision the kept
    point is no worse, on the validation mini-batches, than any of these runs, and it converges
    wherever one of them does (docs/guards/race.md has the theorem).

    Args:
      learned: per-step transformation, started from the kept point in every window. It takes
        optax's own extra args `value`, `grad` and `value_fn`. Nest a guard as
        ``streaming(guard)``.
      *fallbacks: at least one per-step transformation.
      n_t: training mini-batches of a window.
      n_c: validation mini-batches of a window.
      on_reject: state of `learned` after a window that it lost, when it goes on from another point
        than its own: "advance" keeps the state, "rollback" restores the one before the window,
        "reset" starts afresh. Step counts (fields named ``count``, except next to moments ``mu``)
        always advance. A state that is not finite is never kept.
      jumps: adds a second run of every fallback, which jumps to the kept point after 1, 2, 4, 8,
        ... windows and so goes on from what the learned optimizer has won. The first runs, and
        with them the promise, are unchanged.

    Returns:
      A `Guard`; its ``update(None, state, params, *, loss_fn, train_batches, eval_batches)`` takes
      batches with leading axes ``[n_t, ...]`` and ``[n_c, ...]``. With k fallbacks it costs
      (k + 1) n_t gradients and (k + 1) n_c losses, and keeps k more copies of the params. With
      `jumps`, k counts twice.

    Raises:
      ValueError: when there is no fallback or an option is out of range; at `update`, when
        `params`, `loss_fn` or batches are missing, `updates` are given, or a window has another
        size.

    Examples:
      >>> guard = race(optax.lion(1e-2), optax.adam(1e-3), n_t=5, n_c=2)
      >>> guard.window  # mini-batches for `metaopt.windows`
      (5, 2)

    References:
      docs/guards/race.md; not from a paper.
    """
    check_sizes("race", n_t, n_c)
    if not fallbacks:
        raise ValueError("race: give at least one fallback: race(learned, fallback).")
    check_choice("race: on_reject", on_reject, ("advance", "rollback", "reset"))
    learned_tx = inner_transformation("race", "learned", learned)
    plain_txs = tuple(
        inner_transformation("race", f"fallback {index}", fallback)
        for index, fallback in enumerate(fallbacks)
    )
    run_txs = (*plain_txs, *plain_txs) if jumps else plain_txs
    num_plain, num_candidates = len(plain_txs), 1 + len(run_txs)

    def init_fn(params):
        return RaceState(
            learned=learned_tx.init(params),
            points=tuple(jax.tree.map(jnp.array, params) for _ in run_txs),
            fallbacks=tuple(tx.init(params) for tx in run_txs),
            info=init_info(num_candidates, n_t=n_t, n_c=n_c),
        )

    def start(state: RaceState, params):
        windows = state.info.windows
        # True at powers of two, and at 0, where all runs are at one point.
        is_jump = (windows & (windows - 1)) == 0
        plain_points = state.points[:num_plain]
        jumping_points = [
            optax.tree.where(is_jump, params, point) for point in state.points[num_plain:]
        ]
        points = (params, *plain_points, *jumping_points)
        return points, (state.learned, *state.fallbacks)

    def decide(state: RaceState, params, runners: Runners, lengths):
        mask = jnp.arange(runners.losses.shape[1]) < lengths[1]
        losses = scores(runners, mask)
        best_run = 1 + jnp.argmin(losses[1:])
        accepted = losses[0] < losses[best_run]
        kept_start = ~jnp.any(jnp.isfinite(losses))
        winner = jnp.where(kept_start, -1, jnp.where(accepted, 0, best_run))
        new_params = select(winner, runners.points, params)

        before = keep_counts(state.learned, runners.states[0])
        after = keep_finite(runners.states[0], before)
        if on_reject == "advance":
            rejected = after
        elif on_reject == "rollback":
            rejected = before
        else:
            rejected = keep_counts(learned_tx.init(new_params), after)
        info = record_decision(
            state.info,
            winner=winner,
            accepted=accepted,
            losses=losses,
            kept_start=kept_start,
            gradient_evals=num_candidates * lengths[0],
            loss_evals=num_candidates * lengths[1],
        )
        return new_params, RaceState(
            learned=optax.tree.where(accepted, after, rejected),
            points=runners.points[1:],
            fallbacks=runners.states[1:],
            info=info,
        )

    return runner_guard(
        "race",
        (learned_tx, *run_txs),
        init=init_fn,
        start=start,
        decide=decide,
        n_t=n_t,
        n_c=n_c,
    )
