"""The Meta Guards SMG and AMG: theta is part of the guard's state and keeps adapting."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from metaopt.core.types import LearnedOptimizer, Params, Theta
from metaopt.guards.core import Guard, GuardInfo
from metaopt.guards.meta_core import Method, Objective, Pair
from metaopt.guards.meta_window import meta_guard


class MetaGuardState(NamedTuple):
    """What a Meta Guard keeps.

    Attributes:
      theta: adapted meta-parameters, the averaged memory included. It has the structure of
        `LearnedOptimizer.init`: what `apply` takes and what a checkpoint holds.
      used_gradient: whether the last fallback was the plain gradient step (AMG; else False).
      info: diagnostics. Candidates: learned, fallback; for AMG then the fallback unrolled, and
        the starting point.
    """

    theta: Theta
    used_gradient: Bool[Array, ""]
    info: GuardInfo


def smg(
    learned: LearnedOptimizer,
    theta: Theta,
    *,
    n_t: int = 10,
    n_c: int = 10,
    lr_params: float = 3.0,
    lr_theta: float = 0.1,
    second_order: bool = False,
    objective: Objective = "next",
    num_steps: Any = None,
) -> Guard:
    r"""Simple Meta Guard: the fallback descends in params x and meta-parameters theta together.

    With :math:`g^T(x, \theta)` = T steps of the learned optimizer from x, whose final memory,
    averaged over coordinates, is written back into theta (`learned.absorb`):

    .. math:: \text{learned} = g^T(x, \theta; B_1), \quad
       \text{fallback} = (x, \theta) - (\lambda_x \nabla_x, \lambda_\theta \nabla_\theta)
       \, \ell(g^T(x, \theta; B_1); C)

    The pair whose T further steps on B2 end at the lower mean loss on V is kept; a tie keeps the
    learned one (as the paper's listing does). A pair, or its end, that is not finite counts as
    +inf; where both do, the starting pair stays.

    Args:
      learned, theta: the family, and the meta-parameters to start with.
      n_t: T, steps of the learned optimizer per window. (0: plain gradient descent.)
      n_c: validation mini-batches of a window.
      lr_params, lr_theta: step sizes of the fallback, 3.0 and 0.1 in the paper.
      second_order: differentiate through the gradients that the learned optimizer sees. The paper
        is silent; the exact gradient is up to 1e5 times longer, so that lr_params = 3 cannot mean
        it.
      objective: where the loss is that the fallback descends. "next": on C, the mini-batch after
        the T steps; "validation": the mean over V, and no mini-batch serves as C.
      num_steps: horizon passed to ``learned.apply``.

    Returns:
      A guard; ``update(None, state, params, *, loss_fn, train_batches, eval_batches)`` with
      `train_batches` ``[2 n_t + 1, ...]`` = B1 (T), C (1), B2 (T), and `eval_batches` V
      ``[n_c, ...]`` (``guard.window`` holds both sizes). Costs 3 T + 1 gradients, one back-
      propagation through T learned steps, and 2 n_c losses; with `objective` "validation", 3 T +
      n_c gradients.

    Raises:
      ValueError: an option out of range; `params`, `loss_fn` or batches missing, `updates` given,
        or windows of another size; `streaming` with `second_order` or `objective` "validation".

    References: Meta Guard, Algorithm 1; docs/guards/smg.md lists what it leaves open.
    """

    method = Method(
        name="smg",
        propose=_descend_both,
        unrolled=lambda learned, fallback: (learned, fallback),
        candidates=lambda start, learned, fallback, ends: (
            (learned, fallback),
            tuple(end.params for end in ends),
        ),
        pick=lambda scores: jnp.where(scores[0] > scores[1], 1, 0),
        num_candidates=2,
        gradients=3 * n_t + _objective_batches(objective, n_c),
        losses=2 * n_c,
    )
    return meta_guard(
        method,
        learned,
        theta,
        MetaGuardState,
        n_t=n_t,
        n_c=n_c,
        lr_params=lr_params,
        lr_theta=lr_theta,
        second_order=second_order,
        objective=objective,
        num_steps=num_steps,
    )


def amg(
    learned: LearnedOptimizer,
    theta: Theta,
    *,
    n_t: int = 10,
    n_c: int = 10,
    lr_params: float = 3.0,
    lr_theta: float = 0.1,
    second_order: bool = False,
    objective: Objective = "next",
    num_steps: Any = None,
) -> Guard:
    r"""Adaptive Meta Guard: the best of four, so that the loss never rises.

    As `smg`, but the fallback is the plain gradient step :math:`(x - \lambda_x \nabla \ell(x; C),
    \theta)` where :math:`\ell(x; C) \le \ell(x_T; C)` (equality satisfies both of the paper's
    cases), and SMG's else. Of the learned pair, the fallback, the fallback unrolled by T steps on
    B2, and the starting pair, the first with the lowest mean loss on V is kept (`info.winner` 0
    to 3). On a full batch the loss therefore never rises, whatever theta.

    Args, Raises: as `smg`.

    Returns:
      A guard with `smg`'s contract. Costs 2 T + 1 gradients, one back-propagation through T
      learned steps where it is needed (`lax.cond`; under `vmap` always), and 4 n_c + 2 losses.

    References: Meta Guard, Algorithm 2; docs/guards/amg.md lists what it leaves open.
    """

    def propose(ahead: Callable, loss: Callable, start: Pair, rates: Pair):
        end_loss, backward, learned_pair = jax.vjp(ahead, start, has_aux=True)
        plain = ~(end_loss < loss(start.params))  # NaN at the end: the plain step

        def gradient():
            return Pair(
                _descend(start.params, jax.grad(loss)(start.params), rates.params), start.theta
            )

        def both():
            (gradients,) = backward(jnp.ones_like(end_loss))
            return _step(start, gradients, rates)

        return learned_pair, jax.lax.cond(plain, gradient, both), plain

    method = Method(
        name="amg",
        propose=propose,
        unrolled=lambda learned, fallback: (fallback,),
        candidates=lambda start, learned, fallback, ends: (
            (learned, fallback, ends[0], start),
            (learned.params, fallback.params, ends[0].params, start.params),
        ),
        pick=jnp.argmin,  # the first of the lowest
        num_candidates=4,
        gradients=2 * n_t + _objective_batches(objective, n_c),
        losses=4 * n_c + 2 * _objective_batches(objective, n_c),
    )
    return meta_guard(
        method,
        learned,
        theta,
        MetaGuardState,
        n_t=n_t,
        n_c=n_c,
        lr_params=lr_params,
        lr_theta=lr_theta,
        second_order=second_order,
        objective=objective,
        num_steps=num_steps,
    )


def _objective_batches(objective: Objective, n_c: int) -> int:
    return n_c if objective == "validation" else 1


def _descend_both(ahead: Callable, loss: Callable, start: Pair, rates: Pair):
    """SMG's proposals: learned pair, fallback pair, False (no plain gradient step)."""
    del loss
    (_, learned_pair), gradients = jax.value_and_grad(ahead, has_aux=True)(start)
    return learned_pair, _step(start, gradients, rates), jnp.array(False)


def _step(start: Pair, gradients: Pair, rates: Pair) -> Pair:
    return Pair(*(_descend(s, g, lr) for s, g, lr in zip(start, gradients, rates, strict=True)))


def _descend(point: Params, gradient: Params, lr: float) -> Params:
    """Exactly what `optax.sgd(lr)` does."""
    return optax.apply_updates(point, optax.tree.scale(-lr, gradient))
