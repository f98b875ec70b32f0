"""The residual guard (GL2O, Safe-L2O): a proposal is accepted if its residual is small enough."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_choice, check_integer, check_number
from metaopt.core.rollouts import value_and_grad
from metaopt.core.trees import add_to_count, all_finite, with_nodes_of
from metaopt.guards.core import (
    GuardInfo,
    check_whole,
    init_info,
    inner_transformation,
    keep_counts,
    keep_finite,
    record_decision,
    select,
)
from metaopt.guards.forms import Guard, losses_of

SequenceName = Literal["GS", "AA", "EMA", "RT", "RM"]
SEQUENCES: tuple[SequenceName, ...] = ("GS", "AA", "EMA", "RT", "RM")


class Safeguard(NamedTuple):
    """The sequence mu that residuals are compared with.

    Attributes:
      threshold: float ``[]``, mu_k without the factor alpha; +inf before the first step.
      terms: int32 ``[]``, number of residuals in mu_k, for the sequence "AA".
      recent: for the sequence "RM" the last m accepted residuals ``[m]``, newest first. Otherwise
        ``[1]``, since orbax saves no arrays without elements.
    """

    threshold: Float[Array, ""]
    terms: Int[Array, ""]
    recent: Float[Array, " m"]


class GL2OState(NamedTuple):
    """State of `gl2o`.

    Attributes:
      learned: state of the learned transformation.
      fallback: state of the fallback transformation.
      safeguard: the threshold and what it is computed from.
      model_state: model state after the last mini-batch that left it finite, or None.
      residual: float ``[]``, residual of the last proposal; +inf before the first step.
      info: diagnostics. A window is one step, and the candidates are (learned, fallback). `losses`
        stay +inf, since residuals decide. `gradient_evals` includes the caller's gradient.
    """

    learned: Any
    fallback: Any
    safeguard: Safeguard
    model_state: Any
    residual: Float[Array, ""]
    info: GuardInfo


def gl2o(
    learned: optax.GradientTransformation,
    fallback: optax.GradientTransformation,
    *,
    sequence: SequenceName = "EMA",
    alpha: float = 0.99,
    factor: float = 0.9,
    m: int = 30,
    residual: Literal["step", "gradient"] = "step",
    on_reject: Literal["advance", "rollback"] = "advance",
) -> Guard:
    r"""Residual guard: accepts a proposal if one fallback step from it is short enough.

    .. math:: x_{k+1} = y_k \text{ if } \|S(y_k)\| \le \alpha \mu_k \text{ else } T(x_k),
       \quad S(x) = x - T(x), \quad \mu_1 = \|S(x_1)\|

    where :math:`T` is one step of `fallback`, :math:`S` its residual (for SGD the learning rate
    times the gradient) and :math:`y_k` the proposal of `learned` from :math:`x_k`. The threshold
    changes on acceptance only. With :math:`r = \|S(y_k)\|`, :math:`c` = `factor` and :math:`n` the
    number of terms so far, of which :math:`\mu_1` is the first, `sequence` is one of

    - "GS", geometric: :math:`\mu_{k+1} = c \mu_k`
    - "AA", arithmetic average: :math:`\mu_{k+1} = (r + n \mu_k) / (n + 1)`
    - "EMA", exponential moving average: :math:`\mu_{k+1} = c r + (1 - c) \mu_k`
    - "RT", recent term: :math:`\mu_{k+1} = r`
    - "RM", recent maximum: :math:`\mu_{k+1}` is the maximum of the last `m` terms

    Warning:
      A small residual is not a small loss. A proposal that saturates a network has no gradient and
      is accepted. Prefer `lgl2o` where losses can be compared.

    Args:
      learned: per-step transformation that makes proposals.
      fallback: per-step transformation, which sees every gradient at :math:`x_k`.
      sequence: how the threshold changes. The defaults of `sequence`, `alpha`, `factor` and `m`
        are those of LGL2O's baseline.
      alpha: factor on the threshold, in [0, 1]. 0 accepts nothing.
      factor: in [0, 1]; for "GS" the ratio of the sequence, for "EMA" the weight of the new
        residual, as in Heaton's code. The papers call it theta.
      m: number of recent terms, for "RM".
      residual: "step" measures the fallback's step; "gradient" measures the gradient instead, so
        that a decaying learning rate does not mix scales in the threshold.
      on_reject: state of `learned` after a rejected proposal: "advance" keeps the one after the
        step, "rollback" restores the one before it. The papers are silent. Step counts (fields
        named ``count``, except next to moments ``mu``) always advance.

    Returns:
      A `Guard` that decides at each step. Its `update` uses the gradient that it is given, or
      computes it where that is None or there is a model state. It also takes
      `residual_value_fn`, another loss to measure the residual with. It costs one more gradient
      than a step of either transformation, at the proposal.

    Raises:
      ValueError: when an option is out of range; at `update`, when `params` or `value_fn` is
        missing.

    References:
      Heaton et al., *Safeguarded Learned Convex Optimization*, 2020 (Safe-L2O)

      Premont-Schwarz et al., [A Simple Guard for Learned Optimizers](
      https://arxiv.org/abs/2201.12426), section 3 and appendix E

      docs/guards/gl2o.md lists what the papers leave open and what we chose.
    """
    check_choice("gl2o: sequence", sequence, SEQUENCES)
    check_choice("gl2o: residual", residual, ("step", "gradient"))
    check_choice("gl2o: on_reject", on_reject, ("advance", "rollback"))
    check_number("gl2o: alpha", alpha, least=0, most=1)
    check_number("gl2o: factor", factor, least=0, most=1)
    check_integer("gl2o: m", m, 1)
    learned_tx = inner_transformation("gl2o", "learned", learned)
    fallback_tx = inner_transformation("gl2o", "fallback", fallback)

    def residual_norm(grads, step):
        norm = optax.tree.norm(grads if residual == "gradient" else step)
        return jnp.asarray(norm, jnp.result_type(float))

    def init_fn(params, model_state=None):
        check_whole("gl2o", params)
        return GL2OState(
            learned=learned_tx.init(params),
            fallback=fallback_tx.init(params),
            safeguard=_init_safeguard(m if sequence == "RM" else 1),
            model_state=jax.tree.map(jnp.array, model_state),
            residual=jnp.array(jnp.inf, jnp.result_type(float)),
            info=init_info(2, n_t=1, n_c=0),
        )

    def update_fn(
        updates,
        state: GL2OState,
        params=None,
        *,
        value_fn: Any = None,
        residual_value_fn: Any = None,
        **extra_args,
    ):
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(
                f"gl2o: update is missing {missing}; call "
                "update(grads, state, params, value_fn=value_fn) with the loss on this mini-batch."
            )
        state = with_nodes_of(lambda: init_fn(params, state.model_state), state)
        losses = losses_of("gl2o", value_fn, None, state.model_state)
        probe_fn = value_fn if residual_value_fn is None else residual_value_fn
        probe = losses_of("gl2o", probe_fn, None, state.model_state)
        value = extra_args.pop("value", None)
        extra_args.pop("grad", None)
        model_state = state.model_state
        if updates is None or model_state is not None:
            (value, model_state), updates = value_and_grad(losses.train, params, model_state)
        elif value is None:
            value, _ = losses.train(params, None)

        # The two candidates: y of the learned transformation, z of the fallback.
        extra = {
            **extra_args,
            "value": value,
            "grad": updates,
            "value_fn": losses.at(state.model_state),
        }
        z_step, z_state = fallback_tx.update(updates, state.fallback, params, **extra)
        y_step, y_state = learned_tx.update(updates, state.learned, params, **extra)
        y, z = optax.apply_updates(params, y_step), optax.apply_updates(params, z_step)

        # The residual of y: one more fallback step, from y, whose state is not kept.
        (value, _), probe_grad = value_and_grad(probe.train, y, state.model_state)
        extra = {
            **extra_args,
            "value": value,
            "grad": probe_grad,
            "value_fn": probe.at(state.model_state),
        }
        probe_step, _ = fallback_tx.update(probe_grad, state.fallback, y, **extra)
        r = residual_norm(probe_grad, probe_step)
        safeguard = _start_safeguard(state.safeguard, residual_norm(updates, z_step))

        # A comparison with NaN is false, so NaN is rejected.
        accepted = (r <= alpha * safeguard.threshold) & jnp.isfinite(r) & all_finite(y)
        kept_start = ~accepted & ~all_finite(z)
        winner = jnp.where(kept_start, -1, jnp.where(accepted, 0, 1))

        y_before = keep_counts(state.learned, y_state)
        y_after = keep_finite(y_state, y_before)
        z_before = keep_counts(state.fallback, z_state)
        no_step = optax.tree.zeros_like(params)
        return select(winner, (y_step, z_step), no_step), GL2OState(
            learned=optax.tree.where(accepted | (on_reject == "advance"), y_after, y_before),
            fallback=optax.tree.where(kept_start, z_before, z_state),
            safeguard=optax.tree.where(
                accepted, _next_safeguard(sequence, factor, safeguard, r), safeguard
            ),
            model_state=keep_finite(model_state, state.model_state),
            residual=r,
            info=record_decision(
                state.info,
                winner=winner,
                accepted=accepted,
                losses=state.info.losses,
                kept_start=kept_start,
                gradient_evals=2,
                loss_evals=0,
            ),
        )

    return Guard(init_fn, update_fn)  # type: ignore[arg-type]


def _init_safeguard(m: int) -> Safeguard:
    dtype = jnp.result_type(float)
    return Safeguard(
        threshold=jnp.array(jnp.inf, dtype),
        terms=jnp.array(1, jnp.int32),
        recent=jnp.full(m, -jnp.inf, dtype),
    )


def _start_safeguard(safeguard: Safeguard, residual: Float[Array, ""]) -> Safeguard:
    """Sets mu_1 to `residual` unless the sequence has started, that is, has a finite threshold."""
    first = Safeguard(
        threshold=residual,
        terms=safeguard.terms,
        recent=safeguard.recent.at[:1].set(residual),
    )
    return optax.tree.where(jnp.isfinite(safeguard.threshold), safeguard, first)


def _next_safeguard(
    sequence: SequenceName, factor: float, safeguard: Safeguard, r: Float[Array, ""]
) -> Safeguard:
    """Returns the sequence after a proposal with residual `r` was accepted."""
    mu, n, recent = safeguard
    if sequence == "GS":
        mu = factor * mu
    elif sequence == "AA":
        mu = (r + n * mu) / (n + 1.0)
    elif sequence == "EMA":
        mu = factor * r + (1.0 - factor) * mu
    elif sequence == "RT":
        mu = r
    else:
        recent = jnp.concatenate([r[None], recent[:-1]])
        mu = jnp.max(recent)
    return Safeguard(mu, add_to_count(n), recent)
