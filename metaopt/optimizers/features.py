"""What learned optimizers see: pure functions from gradients, statistics and time to inputs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_integer

_TINY = 1e-30  # keeps log and its derivative finite at a gradient of exactly zero


def log_sign(grad: Float[Array, "..."], p: float = 10.0) -> Float[Array, "... 2"]:
    r"""Gradients ``[...]`` of any scale as two bounded-slope features ``[..., 2]``.

    .. math:: |g| \ge e^{-p}: (\log|g| / p, \mathrm{sign}\, g); \quad
       |g| < e^{-p}: (-1, e^p g)

    Continuous at the threshold, odd in its second feature; zero maps to ``(-1, 0)``.

    References: Andrychowicz et al. 2016, appendix A (p = 10 there; 5 in their released code).
    """
    magnitude = jnp.abs(grad)
    large = magnitude >= jnp.exp(-p)
    log = jnp.log(jnp.maximum(magnitude, _TINY)) / p
    return jnp.stack(
        [jnp.where(large, log, -1.0), jnp.where(large, jnp.sign(grad), grad * jnp.exp(p))], axis=-1
    )


def safe_log(x: Float[Array, "..."], floor: float = 1e-8) -> Float[Array, "..."]:
    """``log(max(x, floor))``: norms of zero (fresh biases) give a finite feature."""
    return jnp.log(jnp.maximum(x, floor))


def ema_update(
    ema: Float[Array, "... G"], value: Float[Array, "..."], gammas: Float[Array, " G"]
) -> Float[Array, "... G"]:
    """``gamma * ema + (1 - gamma) * value`` for G gammas: ``[..., G], [...] -> [..., G]``."""
    return gammas * ema + (1.0 - gammas) * value[..., None]


def ema_debias(
    ema: Float[Array, "... G"], count: Int[Array, ""], gammas: Float[Array, " G"]
) -> Float[Array, "... G"]:
    """Divides by ``1 - gamma^count``, count >= 1: the mean of a constant is that constant."""
    return ema / (1.0 - gammas ** count.astype(jnp.float32))


def relative_time(
    step: Int[Array, ""],
    num_steps: Int[Array, ""] | int,
    points: Sequence[float],
    slope: float = 10.0,
) -> Float[Array, " points"]:
    """``tanh(slope * (k / K - p_j))``: soft indicators that a part of the run is done."""
    fraction = step.astype(jnp.float32) / jnp.asarray(num_steps, jnp.float32)
    return jnp.tanh(slope * (fraction - jnp.asarray(points, jnp.float32)))


def absolute_time(
    num_steps: Int[Array, ""] | int, scales: Sequence[float]
) -> Float[Array, " scales"]:
    """``tanh(log(K / scale_j))``: the length of the run, constant during it."""
    return jnp.tanh(jnp.log(jnp.asarray(num_steps, jnp.float32) / jnp.asarray(scales, jnp.float32)))


def check_num_steps(name: str, num_steps: jax.Array | int | None) -> jax.Array | int:
    """The horizon, or `ValueError` if it is missing or not positive (a traced one is trusted)."""
    if num_steps is None:
        raise ValueError(
            f"{name}: the horizon is needed: apply(theta, num_steps=K), K = steps of the whole run."
        )
    if not isinstance(num_steps, Tracer):
        check_integer(f"{name}: num_steps", num_steps, 1)
    return num_steps
