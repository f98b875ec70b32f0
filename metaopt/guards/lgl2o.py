"""The loss guard of LGL2O, in deterministic, window and adaptive form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from metaopt.core.checks import check_callable, check_choice, check_fields, check_integer, short
from metaopt.core.types import LearnedOptimizer, Params, Theta
from metaopt.guards.core import (
    Guard,
    GuardInfo,
    check_sizes,
    inner,
    keep_counts,
    masked_mean,
    new_info,
    record,
    score,
    select,
    without_new_nan,
)
from metaopt.guards.runners import Runs, runner_guard

OnReject = Literal["rollback", "advance", "reset"]


class LGL2OState(NamedTuple):
    """Attributes: learned, fallback: inner states; info: diagnostics, candidates in this order."""

    learned: Any
    fallback: Any
    info: GuardInfo


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    r"""Larger windows once the validation losses cannot tell the candidates apart (App. H).

    With m, s the mean and standard deviation (over the n_c validation mini-batches) of the losses
    of both candidates y, z and of their difference d, a window is ambiguous iff

    .. math:: \text{std: } |m_y - m_z| \le s_y + s_z, \quad
       \text{sem: } |m_y - m_z| \le (s_y + s_z) / \sqrt{n_c}, \quad
       \text{paired: } |m_d| \le s_d / \sqrt{n_c}.

    Attributes:
      rule: "std" is the paper's text; with mini-batches it doubles almost at once, because the
        spread over batches is shared by both candidates. "paired" removes the shared part.
      growth: factor on n_t and n_c after an ambiguous window (the paper is silent).
      cap: neither n_t nor n_c grows beyond it; they never shrink (the paper is silent).
    """

    rule: Literal["std", "sem", "paired"] = "std"
    growth: int = 2
    cap: int = 160

    def __post_init__(self):
        check_fields(self)
        check_integer("Adaptive: growth", self.growth, 2)
        check_integer("Adaptive: cap", self.cap, 2)

    def max_scale(self, n_t: int, n_c: int) -> int:
        """The largest factor on both sizes."""
        if n_c < 2:
            raise ValueError(
                "Adaptive: n_c must be at least 2 with adaptive sizes, "
                f"got {n_c}: one loss has no spread."
            )
        if max(n_t, n_c) > self.cap:
            raise ValueError(
                f"Adaptive: cap must be at least n_t and n_c, got cap {self.cap} "
                f"for n_t {n_t}, n_c {n_c}."
            )
        scale = 1
        while scale * self.growth * max(n_t, n_c) <= self.cap:
            scale *= self.growth
        return scale

    def ambiguous(self, losses: Float[Array, "2 C"], mask: Bool[Array, " C"]) -> jax.Array:
        """Whether ``losses [2, C]``, of which those in ``mask [C]`` count, cannot be told apart."""
        if self.rule == "paired":
            losses = losses[:1] - losses[1:]
        mean = masked_mean(losses, mask)
        spread = jnp.sqrt(masked_mean(jnp.square(losses - mean[:, None]), mask))
        if self.rule != "std":
            spread = spread / jnp.sqrt(jnp.sum(mask))
        distance = mean[0] if self.rule == "paired" else mean[0] - mean[1]
        return jnp.abs(distance) <= jnp.sum(spread)  # False for NaN: no evidence, no growth


def averaged(learned: LearnedOptimizer, theta: Theta, *, num_steps: Any = None) -> Callable:
    """For `lgl2o(average=...)`: every coordinate's memory becomes the mean over coordinates.

    This is the g^T of the Meta Guards: the mean goes into theta (`learned.absorb`) and out again.
    It is of use for optimizers whose whole state is such a memory; it starts any other afresh.
    """
    return lambda state, params: learned.apply(
        learned.absorb(theta, state), num_steps=num_steps
    ).init(params)


def lgl2o(
    learned: optax.GradientTransformation,
    fallback: optax.GradientTransformation,
    *,
    n_t: int = 10,
    n_c: int = 10,
    on_reject: OnReject = "rollback",
    fallback_on_reject: Literal["advance", "rollback"] = "advance",
    memory: Literal["carry", "fresh"] = "carry",
    average: Callable[[Any, Params], Any] | None = None,
    adaptive: Adaptive | None = None,
) -> Guard:
    r"""Loss guard: keep the learned window iff it ends lower than the fallback's.

    .. math:: x_{k+1} = y_T \text{ if } \bar F(y_T) < \bar F(z_T) \text{ else } z_T,
       \quad y_0 = z_0 = x_k, \quad T = n_t

    with :math:`\bar F` the mean loss over `eval_batches`. Strict: a tie keeps the fallback. A
    candidate counts as +inf unless its loss and params are finite; where both do, x_k stays and
    `info.kept_start` counts it. On the full data as the only mini-batch and with
    ``n_t = n_c = 1`` this is the paper's deterministic Algorithm 1.

    Args:
      learned, fallback: per-step transformations, both run on the same `train_batches`. They get
        optax's own extra args `value`, `grad`, `value_fn`. To nest a guard: `streaming(guard)`.
      n_t, n_c: training and validation mini-batches of a window.
      on_reject: memory of `learned` after a lost window: as before the window, as after it, or
        initial. The papers: "rollback" (Meta Guard, section 3); LGL2O is silent.
      fallback_on_reject: state of `fallback` after a lost window. LGL2O is silent; "advance", our
        choice, spares it moments as old as its last win.
      memory: "fresh" starts every window from the initial memory of `learned` ("w/o Update").
      average: ``(state, params) -> state``, applied to the memory of `learned` after its window;
        `averaged(...)` gives the mean over coordinates, as the Meta Guard paper's baselines.
      adaptive: lets n_t and n_c grow. The next window's sizes are in the state:
        ``windows(iterator, lambda: state.info.n_t, lambda: state.info.n_c)``.

    Step counts (fields named ``count``, not beside moments ``mu``) are global: nothing takes them
    back. A memory that is not finite is never kept: that from before the window takes its place.

    Returns:
      A guard; ``update(None, state, params, *, loss_fn, train_batches, eval_batches)`` with batch
      axes ``[n_t, ...]`` and ``[n_c, ...]``. Costs 2 n_t gradients and 2 n_c losses.

    Raises:
      ValueError: an option out of range; `params`, `loss_fn` or batches missing, `updates` given,
        or windows of another size.

    Examples:
      >>> guard = lgl2o(optax.lion(1e-2), optax.sgd(0.1), n_t=5, n_c=2)
      >>> state = guard.init(jnp.ones(3))
      >>> int(state.info.windows), int(state.info.winner)  # no decision yet
      (0, -1)

    References: LGL2O (arXiv 2201.12426), Algorithms 1 and 2, appendix H; docs/guards/lgl2o.md.
    """
    check_sizes("lgl2o", n_t, n_c)
    check_choice("lgl2o: on_reject", on_reject, ("rollback", "advance", "reset"))
    check_choice("lgl2o: fallback_on_reject", fallback_on_reject, ("advance", "rollback"))
    check_choice("lgl2o: memory", memory, ("carry", "fresh"))
    if average is not None:
        check_callable("lgl2o: average", average)
    if not isinstance(adaptive, Adaptive | None):
        raise ValueError(f"lgl2o: adaptive must be an Adaptive, got {short(adaptive)}.")
    txs = (inner("lgl2o", "learned", learned), inner("lgl2o", "fallback", fallback))

    def init_fn(params):
        return LGL2OState(txs[0].init(params), txs[1].init(params), new_info(2, n_t, n_c))

    def start(state: LGL2OState, params):
        memory_state = state.learned
        if memory == "fresh":
            memory_state = keep_counts(txs[0].init(params), state.learned)
        return (params, params), (memory_state, state.fallback)

    def decide(state: LGL2OState, params, runs: Runs, lengths):
        mask = jnp.arange(runs.losses.shape[1]) < lengths[1]
        scores = jnp.stack(
            [
                score(losses, mask, point)
                for losses, point in zip(runs.losses, runs.points, strict=True)
            ]
        )
        kept_start = ~jnp.any(jnp.isfinite(scores))
        accepted = scores[0] < scores[1]
        winner = jnp.where(kept_start, -1, jnp.where(accepted, 0, 1))
        new_params = select(winner, runs.points, params)

        y_state, z_state = runs.states
        before = (keep_counts(state.learned, y_state), keep_counts(state.fallback, z_state))
        if average is not None:
            y_state = keep_counts(average(y_state, runs.points[0]), y_state)
        y_state = without_new_nan(y_state, before[0])
        lost = {
            "rollback": lambda: before[0],
            "advance": lambda: y_state,
            "reset": lambda: keep_counts(txs[0].init(new_params), y_state),
        }[on_reject]()
        z_lost = (
            without_new_nan(z_state, before[1]) if fallback_on_reject == "advance" else before[1]
        )
        info = record(
            state.info,
            winner,
            accepted,
            scores,
            kept_start,
            gradients=2 * lengths[0],
            losses=2 * lengths[1],
        )
        if adaptive is not None:
            grows = adaptive.ambiguous(runs.losses, mask)
            info = _grown(info, grows, lengths, adaptive.growth, (n_t * max_scale, n_c * max_scale))
        return new_params, LGL2OState(
            learned=optax.tree.where(accepted, y_state, lost),
            fallback=optax.tree.where(winner == 1, z_state, z_lost),
            info=info,
        )

    max_scale = 1 if adaptive is None else adaptive.max_scale(n_t, n_c)
    return runner_guard("lgl2o", txs, init_fn, start, decide, n_t=n_t, n_c=n_c, max_scale=max_scale)


def _grown(info: GuardInfo, grows: jax.Array, lengths, growth: int, largest) -> GuardInfo:
    """`info` with the next window's sizes."""
    sizes = [
        jnp.where(grows, jnp.minimum(growth * length, most), length).astype(jnp.int32)
        for length, most in zip(lengths, largest, strict=True)
    ]
    return info._replace(n_t=jnp.maximum(info.n_t, sizes[0]), n_c=jnp.maximum(info.n_c, sizes[1]))
