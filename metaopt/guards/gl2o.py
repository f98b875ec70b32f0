"""The residual guard (GL2O, Safe-L2O): a proposal must shrink the fallback's residual."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_choice, check_integer, check_number
from metaopt.core.trees import all_finite
from metaopt.guards.core import (
    Guard,
    GuardInfo,
    inner,
    keep_counts,
    new_info,
    record,
    select,
    without_new_nan,
)

Sequence = Literal["GS", "AA", "EMA", "RT", "RM"]
SEQUENCES: tuple[Sequence, ...] = ("GS", "AA", "EMA", "RT", "RM")


class Threshold(NamedTuple):
    """What a proposal's residual is measured by.

    Attributes:
      threshold: mu_k, before the factor alpha; +inf before the first step.
      terms: number of residuals in mu (int32), for the sequence AA.
      recent: the last m accepted residuals ``[m]``, newest first, for RM; else ``[1]``,
        since orbax saves no arrays without elements.
    """

    threshold: Float[Array, ""]
    terms: Int[Array, ""]
    recent: Float[Array, " m"]


class GL2OState(NamedTuple):
    """What the guard carries from step to step.

    Attributes:
      learned, fallback: inner states.
      measure: the threshold and what it is made of.
      residual: that of the last proposal.
      info: diagnostics; a window is one step, candidates are (learned, fallback). `losses` stay
        NaN, since residuals decide here. `gradient_evals` counts the caller's gradient too.
    """

    learned: Any
    fallback: Any
    measure: Threshold
    residual: Float[Array, ""]
    info: GuardInfo


def gl2o(
    learned: optax.GradientTransformation,
    fallback: optax.GradientTransformation,
    *,
    sequence: Sequence = "EMA",
    alpha: float = 0.99,
    theta: float = 0.9,
    m: int = 30,
    residual: Literal["step", "gradient"] = "step",
    on_reject: Literal["advance", "rollback"] = "advance",
) -> Guard:
    r"""Residual guard: accept a proposal y iff the fallback would move little from there.

    .. math:: x_{k+1} = y \text{ if } \|S(y)\| \le \alpha \mu_k \text{ else } T(x_k),
       \quad S(x) = x - T(x), \quad \mu_1 = \|S(x_1)\|

    with T one step of `fallback` (for SGD :math:`S = \lambda \nabla F`). mu changes only on
    acceptance, with r = :math:`\|S(y)\|`:

    ======= =================================== ==========================================
    GS      geometric                           ``theta * mu``
    AA      arithmetic average                  ``(r + n * mu) / (n + 1)``, mu_1 is term 1
    EMA     exponential average                 ``theta * r + (1 - theta) * mu``
    RT      recent term                         ``r``
    RM      recent maximum                      max of the last `m` terms, mu_1 is term 1
    ======= =================================== ==========================================

    .. warning:: A small residual is not a small loss: a proposal that saturates a network has no
       gradient and is accepted. Prefer `lgl2o` where a loss can be compared.

    Args:
      learned, fallback: per-step transformations.
      sequence, alpha, theta, m: as above; the defaults are LGL2O's baseline (appendix E). The
        baseline's theta of EMA weighs the new residual (as in Heaton's code).
      residual: "gradient" measures :math:`\|\nabla F\|` instead of the step, so that a decaying
        learning rate does not mix scales in mu.
      on_reject: memory of `learned` after a rejected step. The papers are silent.

    Step counts (fields named ``count``, not beside moments ``mu``) are global; `fallback`
    sees every gradient at x_k.

    Returns:
      A per-step transformation: ``update(grads, state, params, *, value_fn)``; it also runs as
      ``windowed(gl2o(...))``. Costs one more gradient than a step of either, at y. It is taken on
      the step's own mini-batch; ``update(..., residual_value_fn=...)`` gives it another.

    Raises:
      ValueError: an option out of range; `params` or `value_fn` missing.

    References: Heaton et al. 2020 (Safe-L2O); LGL2O, section 3; docs/guards/gl2o.md.
    """
    check_choice("gl2o: sequence", sequence, SEQUENCES)
    check_choice("gl2o: residual", residual, ("step", "gradient"))
    check_choice("gl2o: on_reject", on_reject, ("advance", "rollback"))
    check_number("gl2o: alpha", alpha, least=0, most=1)
    check_number("gl2o: theta", theta, least=0, most=1)
    check_integer("gl2o: m", m, 1)
    tx, safe = inner("gl2o", "learned", learned), inner("gl2o", "fallback", fallback)

    measured = lambda grads, step: _norm(grads if residual == "gradient" else step)

    def init_fn(params):
        return GL2OState(
            learned=tx.init(params),
            fallback=safe.init(params),
            measure=_new_threshold(m if sequence == "RM" else 1),
            residual=jnp.array(jnp.nan, jnp.result_type(float)),
            info=new_info(2, 1, 0),
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
        extra = {**extra_args, "value_fn": value_fn}
        z_step, z_state = safe.update(updates, state.fallback, params, **extra)
        y_step, y_state = tx.update(updates, state.learned, params, **extra)
        y, z = (optax.apply_updates(params, step) for step in (y_step, z_step))

        probe_fn = value_fn if residual_value_fn is None else residual_value_fn
        value, grad = jax.value_and_grad(probe_fn)(y)
        extra = {**extra_args, "value": value, "grad": grad, "value_fn": probe_fn}
        probe, _ = safe.update(grad, state.fallback, y, **extra)
        r = measured(grad, probe)
        measure = _started(state.measure, measured(updates, z_step))
        # Written so that NaN rejects.
        accepted = (r <= alpha * measure.threshold) & jnp.isfinite(r) & all_finite(y)
        kept_start = ~accepted & ~all_finite(z)
        winner = jnp.where(kept_start, -1, jnp.where(accepted, 0, 1))

        before = keep_counts(state.learned, y_state)
        memory = without_new_nan(y_state, before)
        z_before = keep_counts(state.fallback, z_state)
        zeros = optax.tree.zeros_like(params)
        return select(winner, (y_step, z_step), zeros), GL2OState(
            learned=optax.tree.where(accepted | (on_reject == "advance"), memory, before),
            fallback=optax.tree.where(kept_start, z_before, z_state),
            measure=optax.tree.where(accepted, _next(sequence, theta, measure, r), measure),
            residual=r,
            info=record(
                state.info, winner, accepted, state.info.losses, kept_start, gradients=2, losses=0
            ),
        )

    return Guard(init_fn, update_fn, (1, 0), None)


def _norm(tree: Any) -> jax.Array:
    return jnp.asarray(optax.tree.norm(tree), jnp.result_type(float))


def _new_threshold(m: int) -> Threshold:
    dtype = jnp.result_type(float)
    return Threshold(
        jnp.array(jnp.inf, dtype), jnp.array(1, jnp.int32), jnp.full(m, -jnp.inf, dtype)
    )


def _started(measure: Threshold, residual: Float[Array, ""]) -> Threshold:
    """`measure`, or before it has a finite threshold mu_1 = `residual`."""
    recent = measure.recent.at[:1].set(residual)
    started = Threshold(residual, measure.terms, recent)
    return optax.tree.where(jnp.isfinite(measure.threshold), measure, started)


def _next(sequence: Sequence, theta: float, measure: Threshold, r: Float[Array, ""]) -> Threshold:
    """The threshold after a step with residual `r` was accepted."""
    mu, n, recent = measure
    if sequence == "RM":
        recent = jnp.concatenate([r[None], recent[:-1]])
    mu = {
        "GS": lambda: theta * mu,
        "AA": lambda: (r + n * mu) / (n + 1),
        "EMA": lambda: theta * r + (1.0 - theta) * mu,
        "RT": lambda: r,
        "RM": lambda: jnp.max(recent),
    }[sequence]()
    return Threshold(mu, n + 1, recent)
