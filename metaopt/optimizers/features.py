"""Inputs of learned optimizers: pure functions of gradients, statistics and time."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_integer
from metaopt.core.trees import leaf_names

FROZEN_AFTER = 10  # updates: layers behind one that starts at zero have got gradients by then
_TINY = 1e-30  # keeps log and its derivative finite at a gradient of exactly zero


def log_sign(grad: Float[Array, "..."], p: float = 10.0) -> Float[Array, "... 2"]:
    r"""Maps gradients of any scale to two features of bounded slope.

    .. math:: (\log|g| / p, \, \mathrm{sign}(g)) \text{ if } |g| \ge e^{-p},
       \quad (-1, \, e^p g) \text{ otherwise}

    Both features are continuous at the threshold, and the second is odd. Zero maps to ``(-1, 0)``.

    Args:
      grad: gradients ``[...]``.
      p: range of the logarithm, positive.

    Returns:
      The features ``[..., 2]``.

    References:
      Andrychowicz et al., [Learning to learn by gradient descent by gradient descent](
      https://arxiv.org/abs/1606.04474), appendix A (p = 10 there, 5 in their released code)
    """
    magnitude = jnp.abs(grad)
    is_large = magnitude >= jnp.exp(-p)
    log = jnp.log(jnp.maximum(magnitude, _TINY)) / p
    return jnp.stack(
        [jnp.where(is_large, log, -1.0), jnp.where(is_large, jnp.sign(grad), grad * jnp.exp(p))],
        axis=-1,
    )


def safe_log(x: Float[Array, "..."], floor: float = 1e-8) -> Float[Array, "..."]:
    """Returns ``log(max(x, floor))``, which is finite for norms of zero, as of new biases."""
    return jnp.log(jnp.maximum(x, floor))


def ema_update(
    ema: Float[Array, "... G"], value: Float[Array, "..."], gammas: Float[Array, " G"]
) -> Float[Array, "... G"]:
    """Updates G exponential moving averages: ``gamma * ema + (1 - gamma) * value``.

    Args:
      ema: averages ``[..., G]``.
      value: new value ``[...]``.
      gammas: decays ``[G]``.

    Returns:
      The averages ``[..., G]``, which are biased towards their start at zero; see `ema_debias`.
    """
    gammas = jnp.expand_dims(gammas, range(value.ndim))
    return gammas * ema + (1.0 - gammas) * value[..., None]


def ema_debias(
    ema: Float[Array, "... G"], count: Int[Array, ""], gammas: Float[Array, " G"]
) -> Float[Array, "... G"]:
    """Divides by ``1 - gamma^count``, so that the average of a constant is that constant.

    Args:
      ema: averages ``[..., G]`` of `ema_update`, which started at zero.
      count: number of updates, at least 1.
      gammas: decays ``[G]``.
    """
    correction = 1.0 - gammas ** count.astype(jnp.float32)
    return ema / jnp.expand_dims(correction, range(ema.ndim - 1))


def relative_time(
    step: Int[Array, ""],
    num_steps: Int[Array, ""] | int,
    points: Sequence[float],
    slope: float = 10.0,
) -> Float[Array, " points"]:
    """Returns soft indicators that a part of the run is done: ``tanh(slope * (k / K - p_j))``.

    Args:
      step: k, steps done before this one.
      num_steps: K, steps of the whole run.
      points: p_j, parts of the run, in [0, 1].
      slope: slope of the indicators at their points.
    """
    fraction = step.astype(jnp.float32) / jnp.asarray(num_steps, jnp.float32)
    return jnp.tanh(slope * (fraction - jnp.asarray(points, jnp.float32)))


def absolute_time(
    num_steps: Int[Array, ""] | int, scales: Sequence[float]
) -> Float[Array, " scales"]:
    """Returns features of the length of the run: ``tanh(log(K / scale_j))``.

    Args:
      num_steps: K, steps of the whole run.
      scales: numbers of steps that K is compared with.
    """
    return jnp.tanh(jnp.log(jnp.asarray(num_steps, jnp.float32) / jnp.asarray(scales, jnp.float32)))


def check_num_steps(name: str, num_steps: jax.Array | int | None) -> jax.Array | int:
    """Checks the horizon of a learned optimizer. A traced one cannot be checked and is returned.

    Args:
      name: name of the optimizer, for messages.
      num_steps: the argument of `apply`.

    Returns:
      `num_steps`.

    Raises:
      ValueError: when `num_steps` is None, no integer, or below 1.
    """
    if num_steps is None:
        raise ValueError(
            f"{name}: apply needs the number of updates of the whole run, which the step depends "
            "on: apply(theta, num_steps=...)."
        )
    if not isinstance(num_steps, Tracer):
        check_integer(f"{name}: num_steps", num_steps, 1)
    return num_steps


def check_params(name: str, params: Any) -> None:
    """Checks that an update has got params.

    Args:
      name: name of the optimizer, for messages.
      params: the argument of `update`.

    Raises:
      ValueError: when `params` is None.
    """
    if params is None:
        raise ValueError(
            f"{name}: update needs `params`, which the steps depend on: "
            "update(grads, state, params, ...)."
        )


def check_value(name: str, value: Any) -> None:
    """Checks the loss of an update.

    Args:
      name: name of the optimizer, for messages.
      value: the argument of `update`.

    Raises:
      ValueError: when `value` is missing or not one number.
    """
    call = "update(grads, state, params, value=loss)"
    if value is None:
        raise ValueError(f"{name}: update needs the loss as the extra argument `value`: {call}.")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name}: `value` must be one number, got shape {jnp.shape(value)}: {call}."
        )


def warn_at_horizon(name: str, t: Int[Array, ""], num_steps: Int[Array, ""]) -> None:
    """Warns once, when a run goes past its horizon, by a host callback.

    Args:
      name: name of the optimizer, for the message.
      t: number of updates before this one.
      num_steps: horizon of the run.
    """

    def warn(t, num_steps):
        # Compared again, since under vmap a cond runs both of its branches; as numbers, since an
        # operation of JAX in a callback may wait for the program that waits for the callback.
        t, num_steps = int(t), int(num_steps)
        if t == num_steps:
            warnings.warn(
                f"{name}: this run goes past its horizon num_steps={num_steps}; the features of "
                "time stay at the last planned step. Give apply(theta, num_steps=...) the whole "
                "run.",
                stacklevel=2,
            )

    jax.lax.cond(t == num_steps, lambda: jax.debug.callback(warn, t, num_steps), lambda: None)


def warn_of_frozen_leaves(
    name: str,
    theta: Any,
    t: Int[Array, ""],
    skipped: Int[Array, ""],
    params: Any,
    are_frozen: Callable[[], Sequence[Any]],
) -> None:
    """Warns once of leaves whose gradient has been exactly zero since the start of the run.

    They are weights behind `jax.lax.stop_gradient`, or statistics among the params. The warning is
    a host callback at one fixed step, in a branch; all other steps compare two integers. It is
    left out where `theta` is traced, as in meta-training.

    Args:
      name: name of the optimizer, for the message.
      theta: its meta-parameters.
      t: number of updates before this one.
      skipped: how many of them were skipped. After a skipped one there is no warning.
      params: a tree with the leaves of params, for their names.
      are_frozen: returns for each leaf whether its gradients have all been zero, bool ``[]``.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(theta)):
        return
    names = leaf_names(params)

    def warn(is_due, frozen):
        frozen = np.asarray(frozen)  # no operation of JAX in a callback, as in `warn_at_horizon`
        found = [leaf for leaf, is_frozen in zip(names, frozen, strict=True) if is_frozen]
        if is_due and found:  # under vmap a cond runs both of its branches
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            warnings.warn(
                f"{name}: the gradient of {', '.join(found[:5])}{more} has been exactly zero for "
                f"{FROZEN_AFTER} updates, but {name} moves such leaves too. Where they are frozen, "
                "or no weights, keep them from it: optax.partition({'learned': tx, 'frozen': "
                "optax.set_to_zero()}, labels).",
                stacklevel=2,
            )

    is_due = (t == FROZEN_AFTER) & (skipped == 0)
    if names:
        jax.lax.cond(
            is_due,
            lambda: jax.debug.callback(warn, is_due, jnp.stack(list(are_frozen()))),
            lambda: None,
        )
