"""The loss guard of LGL2O, with fixed and with adaptive sizes of windows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from metaopt.core.checks import check_callable, check_choice, check_fields, check_integer, show
from metaopt.core.types import LearnedOptimizer, Params, Theta
from metaopt.guards.core import (
    GuardInfo,
    Losses,
    Process,
    check_lengths,
    check_sizes,
    init_info,
    inner_transformation,
    keep_counts,
    keep_finite,
    masked_mean,
    record_decision,
    score,
    select,
)
from metaopt.guards.forms import Guard, guard_of
from metaopt.guards.runners import Runner, advance

OnReject = Literal["rollback", "advance", "reset"]


class Accepted(NamedTuple):
    """What the decisions of `lgl2o` leave.

    Attributes:
      learned: state of the learned transformation.
      fallback: state of the fallback transformation.
      model_state: model state of the kept point, or None.
      info: diagnostics; the candidates are (learned, fallback).
    """

    learned: Any
    fallback: Any
    model_state: Any
    info: GuardInfo


class Candidates(NamedTuple):
    """The two runners of a window.

    Attributes:
      runners: the runner of the learned transformation and that of the fallback.
      losses: losses ``[2, C]`` that decide. C is the largest size of a window; only the first
        losses of a row are set.
    """

    runners: tuple[Runner, Runner]
    losses: Float[Array, "2 C"]


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    r"""Sizes of windows that grow once the validation losses cannot tell the candidates apart.

    Let m and s be the mean and the standard deviation, over the :math:`n_c` validation
    mini-batches, of the losses of the candidates y and z and of their difference d. A window is
    ambiguous if, for `rule`

    - "std": :math:`|m_y - m_z| \le s_y + s_z`
    - "sem": :math:`|m_y - m_z| \le (s_y + s_z) / \sqrt{n_c}`
    - "paired": :math:`|m_d| \le s_d / \sqrt{n_c}`

    Attributes:
      rule: when a window is ambiguous. "std" is the paper's text. With mini-batches it doubles the
        sizes almost at once, because both candidates share the spread over mini-batches. "paired"
        removes the shared part.
      growth: factor on n_t and n_c after an ambiguous window. The paper is silent.
      cap: largest n_t and n_c. The paper is silent. Sizes never shrink.

    Raises:
      ValueError: when `rule` is unknown, or `growth` or `cap` is below 2.

    References:
      Premont-Schwarz et al., [A Simple Guard for Learned Optimizers](
      https://arxiv.org/abs/2201.12426), appendix H
    """

    rule: Literal["std", "sem", "paired"] = "std"
    growth: int = 2
    cap: int = 160

    def __post_init__(self):
        check_fields(self)
        check_integer("Adaptive: growth", self.growth, 2)
        check_integer("Adaptive: cap", self.cap, 2)

    def max_scale(self, n_t: int, n_c: int) -> int:
        """Returns the largest factor on both sizes, a power of `growth`.

        Raises:
          ValueError: when `n_c` is below 2, or a size is above `cap`.
        """
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
        """Returns whether the losses cannot tell the candidates apart (bool ``[]``).

        Args:
          losses: validation losses ``[2, C]`` of both candidates.
          mask: ``[C]``, which of the losses count.
        """
        if self.rule == "paired":
            losses = losses[:1] - losses[1:]
        mean = masked_mean(losses, mask)
        spread = jnp.sqrt(masked_mean(jnp.square(losses - mean[:, None]), mask))
        if self.rule != "std":
            spread = spread / jnp.sqrt(jnp.sum(mask))
        distance = mean[0] if self.rule == "paired" else mean[0] - mean[1]
        return jnp.abs(distance) <= jnp.sum(spread)  # False for NaN: sizes do not grow

    def next_sizes(
        self, info: GuardInfo, is_ambiguous: jax.Array, lengths: Any, n_t: int, n_c: int
    ) -> GuardInfo:
        """Returns `info` with the sizes of the next window.

        Args:
          info: diagnostics after this window.
          is_ambiguous: bool ``[]``, see `ambiguous`.
          lengths: ``(n_t, n_c)`` of this window.
          n_t: training mini-batches of the first window.
          n_c: validation mini-batches of the first window.
        """
        scale = self.max_scale(n_t, n_c)

        def next_size(length, largest):
            size = jnp.where(is_ambiguous, jnp.minimum(self.growth * length, largest), length)
            return size.astype(jnp.int32)

        next_t, next_c = next_size(lengths[0], scale * n_t), next_size(lengths[1], scale * n_c)
        return info._replace(n_t=jnp.maximum(info.n_t, next_t), n_c=jnp.maximum(info.n_c, next_c))


def average_memory(
    learned: LearnedOptimizer, theta: Theta, *, num_steps: Any = None
) -> Callable[[Any, Params], Any]:
    """Makes the argument `average` of `lgl2o` that averages the memory over coordinates.

    This is what the unroll g^T of the Meta Guards does: the memory is averaged into theta
    (`learned.absorb`), from which a new state begins. It is of use for optimizers whose whole
    state is such a memory; any other starts afresh.

    Args:
      learned: the optimizer.
      theta: its meta-parameters.
      num_steps: horizon passed to ``learned.apply``.

    Returns:
      ``(state, params) -> state``.
    """

    def average(state, params):
        tx = learned.apply(learned.absorb(theta, state), num_steps=num_steps)
        return tx.init(params)

    return average


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
    r"""Loss guard: keeps the learned optimizer's window if it ends lower than the fallback's.

    .. math:: x_{k+1} = y_T \text{ if } \bar F(y_T) < \bar F(z_T) \text{ else } z_T,
       \quad y_0 = z_0 = x_k, \quad T = n_t

    where :math:`y` takes T steps of `learned`, :math:`z` T steps of `fallback`, and
    :math:`\bar F` is the mean loss over n_c further mini-batches. With ``n_c=0`` it is the mean
    of the training losses, each taken before the step on its mini-batch. A tie keeps the fallback.
    A candidate counts as +inf unless its loss and params are finite. When neither is, :math:`x_k`
    stays and `info.kept_start` counts it. On the full data as the only mini-batch and with
    ``n_t = n_c = 1`` this is the paper's deterministic Algorithm 1.

    Step counts (fields named ``count``, except next to moments ``mu``) are global and never
    restored. A memory that is not finite is never kept: the one before the window takes its
    place.

    Args:
      learned: per-step transformation. It takes optax's own extra args `value`, `grad` and
        `value_fn`.
      fallback: per-step transformation, run on the same mini-batches.
      n_t: training mini-batches of a window.
      n_c: validation mini-batches of a window; 0 decides on the training losses.
      on_reject: state of `learned` after a rejected window: "rollback" restores the one before the
        window (Meta Guard, section 3; LGL2O is silent), "advance" keeps the one after it, "reset"
        starts afresh.
      fallback_on_reject: state of `fallback` after a window that `learned` won. LGL2O is silent.
        "advance" is our choice: with "rollback" the moments of the fallback are as old as its last
        win.
      memory: "fresh" starts every window from the initial state of `learned` ("w/o Update").
      average: ``(state, params) -> state``, applied to the state of `learned` after its window.
        `average_memory` gives the mean over coordinates, as in the Meta Guard paper's baselines.
      adaptive: lets n_t and n_c grow. The state holds the sizes of the next window:
        ``windows(iterator, lambda: state.info.n_t, lambda: state.info.n_c)``.

    Returns:
      A `Guard`. Updates are zero until the last mini-batch of a window, whose update leads to the
      chosen point. A window costs 2 n_t gradients and 2 n_c losses. Do not change params inside a
      window.

    Raises:
      ValueError: when an option is out of range; at `init`, when params are masked; at `update`,
        when `params` or `value_fn` is missing, or `eval_fn` is given with ``n_c=0``.

    Examples:
      >>> guard = lgl2o(optax.lion(1e-2), optax.sgd(0.1), n_t=5, n_c=2)
      >>> state = guard.init(jnp.ones(3))
      >>> int(state.info.windows), int(state.info.winner)  # no decision yet
      (0, -1)

    References:
      Premont-Schwarz et al., [A Simple Guard for Learned Optimizers](
      https://arxiv.org/abs/2201.12426), algorithms 1 and 2 and appendix H

      docs/guards/lgl2o.md lists what the paper leaves open and what we chose.
    """
    check_sizes("lgl2o", n_t, n_c, least=(1, 0))
    check_choice("lgl2o: on_reject", on_reject, ("rollback", "advance", "reset"))
    check_choice("lgl2o: fallback_on_reject", fallback_on_reject, ("advance", "rollback"))
    check_choice("lgl2o: memory", memory, ("carry", "fresh"))
    if average is not None:
        check_callable("lgl2o: average", average)
    if not isinstance(adaptive, Adaptive | None):
        raise ValueError(f"lgl2o: adaptive must be an Adaptive, got {show(adaptive)}.")
    learned_tx = inner_transformation("lgl2o", "learned", learned)
    fallback_tx = inner_transformation("lgl2o", "fallback", fallback)

    max_scale = 1 if adaptive is None else adaptive.max_scale(n_t, n_c)
    num_losses = max_scale * (n_c or n_t)
    dtype = jnp.result_type(float)

    def init_fn(params, model_state):
        accepted = Accepted(
            learned=learned_tx.init(params),
            fallback=fallback_tx.init(params),
            model_state=jax.tree.map(jnp.array, model_state),
            info=init_info(2, n_t=n_t, n_c=n_c),
        )
        return accepted, None

    def start(accepted: Accepted, work, params):
        del work
        learned_state = accepted.learned
        if memory == "fresh":
            learned_state = keep_counts(learned_tx.init(params), accepted.learned)
        return Candidates(
            runners=(
                Runner(params, learned_state, accepted.model_state),
                Runner(params, accepted.fallback, accepted.model_state),
            ),
            losses=jnp.zeros((2, num_losses), dtype),
        )

    def train(accepted: Accepted, work: Candidates, index, losses: Losses):
        del accepted
        results = [
            advance(tx, runner, losses)
            for tx, runner in zip((learned_tx, fallback_tx), work.runners, strict=True)
        ]
        runners, values = zip(*results, strict=True)
        work = work._replace(runners=runners)
        if n_c:
            return work
        if losses.held_out:
            raise ValueError("lgl2o: eval_fn needs validation mini-batches; give n_c above 0.")
        return put_losses(work, index, values)

    def validate(accepted: Accepted, work: Candidates, index, losses: Losses):
        del accepted
        values = [
            jnp.mean(losses.judge(runner.params, runner.model_state)) for runner in work.runners
        ]
        return put_losses(work, index, values)

    def put_losses(work: Candidates, index, values):
        column = jnp.stack([value.astype(dtype) for value in values])
        return work._replace(losses=work.losses.at[:, index].set(column))

    def decide(state: Accepted, work: Candidates, params, lengths):
        mask = jnp.arange(num_losses) < lengths[-1]
        points = [runner.params for runner in work.runners]
        losses = jnp.stack(
            [score(row, mask, point) for row, point in zip(work.losses, points, strict=True)]
        )
        kept_start = ~jnp.any(jnp.isfinite(losses))
        accepted = losses[0] < losses[1]
        winner = jnp.where(kept_start, -1, jnp.where(accepted, 0, 1))
        new_params = select(winner, points, params)

        y_state, z_state = (runner.state for runner in work.runners)
        y_before = keep_counts(state.learned, y_state)
        z_before = keep_counts(state.fallback, z_state)
        if average is not None:
            y_state = keep_counts(average(y_state, points[0]), y_state)
        y_state = keep_finite(y_state, y_before)
        if on_reject == "rollback":
            y_rejected = y_before
        elif on_reject == "advance":
            y_rejected = y_state
        else:
            y_rejected = keep_counts(learned_tx.init(new_params), y_state)
        z_rejected = z_before
        if fallback_on_reject == "advance":
            z_rejected = keep_finite(z_state, z_before)

        info = record_decision(
            state.info,
            winner=winner,
            accepted=accepted,
            losses=losses,
            kept_start=kept_start,
            gradient_evals=2 * lengths[0],
            loss_evals=2 * lengths[1] if n_c else 0,
        )
        if adaptive is not None:
            is_ambiguous = adaptive.ambiguous(work.losses, mask)
            info = adaptive.next_sizes(info, is_ambiguous, lengths, n_t, n_c)
        model_states = [runner.model_state for runner in work.runners]
        return new_params, Accepted(
            learned=optax.tree.where(accepted, y_state, y_rejected),
            fallback=optax.tree.where(winner == 1, z_state, z_rejected),
            model_state=select(winner, model_states, state.model_state),
            info=info,
        )

    def split(num_train: int, num_eval: int):
        scale = min(max(num_train // n_t, 1), max_scale)
        check_lengths("lgl2o", (num_train, num_eval), (scale * n_t, scale * n_c))
        return (num_train, num_eval) if n_c else (num_train,)

    lengths: Any = (n_t, n_c) if n_c else (n_t,)
    if adaptive is not None:
        lengths = lambda accepted: jnp.stack([accepted.info.n_t, accepted.info.n_c])
    return guard_of(
        Process(
            name="lgl2o",
            window=(n_t, n_c),
            init=init_fn,
            start=start,
            phases=(train, validate) if n_c else (train,),
            lengths=lengths,
            split=split,
            decide=decide,
            model_state=lambda accepted, work: accepted.model_state,
        )
    )
