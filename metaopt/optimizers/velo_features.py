"""Inputs of VeLO's networks: loss, time and tensor statistics, and 30 columns per parameter.

Celo, Celo2 and the adafac MLP take some of them, with other constants. Every function works in
float32 on one tensor, or on none. docs/optimizers/velo.md has all formulas and their sources.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaopt.core.trees import add_to_count

NUM_HORIZONS = 10  # running means of the loss
GROUP_SIZES = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)  # columns per group, 30 together

_TIMES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_MAX_RANK = 5

################################################################################
# Inputs that all tensors share: loss and time
################################################################################


class LossBuffer(NamedTuple):
    """Running means of the loss over ten horizons, from 10 steps to the whole run.

    Attributes:
      mean: float32 ``[10]``, the means, without bias correction.
      low: float32 ``[10]``, the lowest bias-corrected means so far.
      count: int32 ``[]``, number of losses so far.
    """

    mean: Float[Array, " 10"]
    low: Float[Array, " 10"]
    count: Int[Array, ""]


def init_loss_buffer() -> LossBuffer:
    """Returns the buffer before the first loss."""
    return LossBuffer(
        mean=jnp.zeros(NUM_HORIZONS, jnp.float32),
        low=jnp.full(NUM_HORIZONS, 999999999999.0, jnp.float32),
        count=jnp.zeros((), jnp.int32),
    )


def update_loss_buffer(
    buffer: LossBuffer, loss: Float[Array, ""], num_steps: jax.Array
) -> tuple[LossBuffer, jax.Array]:
    """Adds a loss to the buffer.

    With :math:`d = e^{-1/h}` every :math:`1 - d^n` is computed as ``-expm1(-n / h)``. At horizons
    of 1e5 steps the plain difference loses three digits in float32.

    Args:
      buffer: the running means.
      loss: the new loss.
      num_steps: horizon of the run, int32 ``[]``.

    Returns:
      The new buffer, and the features ``[9]`` of the loss: each mean relative to the next slower
      one, clipped to [-1, 1]; zero for the first two losses.
    """
    # In float32 also where JAX's 64 bits are enabled.
    logs = jnp.log(jnp.float32(10.0)), jnp.log(num_steps.astype(jnp.float32))
    horizon = jnp.exp(jnp.linspace(*logs, NUM_HORIZONS, dtype=jnp.float32))
    count = add_to_count(buffer.count)
    correction = -jnp.expm1(-count.astype(jnp.float32) / horizon)
    top = jnp.where(buffer.count == 0, loss, jnp.max(buffer.mean / correction))
    loss = jnp.minimum(2.0 * jnp.abs(top), loss)
    mean = buffer.mean - jnp.expm1(-1.0 / horizon) * (loss - buffer.mean)
    corrected = mean / correction
    low = jnp.minimum(buffer.low, corrected)
    room = jnp.maximum(1e-8, corrected[1:] - low[:-1])
    features = jnp.clip((corrected[:-1] - low[:-1]) / room - 1.0, -1.0, 1.0)
    features = jnp.where(count <= 2, 0.0, features)
    return LossBuffer(mean=mean, low=low, count=count), features


def time_features(t: Int[Array, ""], num_steps: jax.Array) -> jax.Array:
    """Returns soft steps ``[9]`` of the fraction of the run that is done.

    Args:
      t: number of updates before this one.
      num_steps: horizon of the run, int32 ``[]``.
    """
    fraction = t.astype(jnp.float32) / num_steps.astype(jnp.float32)
    return jnp.tanh(10.0 * (fraction - jnp.asarray(_TIMES, jnp.float32)))


def progress_features(
    buffer: LossBuffer, loss: Float[Array, ""], t: Int[Array, ""], num_steps: jax.Array
) -> tuple[LossBuffer, jax.Array]:
    """Adds a loss to the buffer, and returns it with the features ``[18]`` of time and loss.

    A loss that is not finite counts as 0. Past the horizon, time stays at the last planned step.

    Args:
      buffer: the running means.
      loss: the new loss.
      t: number of updates before this one.
      num_steps: horizon of the run, int32 ``[]``.
    """
    finite_loss = jnp.where(jnp.isfinite(loss), loss, 0.0)
    buffer, loss_features = update_loss_buffer(buffer, finite_loss, num_steps)
    time = time_features(jnp.minimum(t, num_steps - 1), num_steps)
    return buffer, jnp.concatenate([time, loss_features])


################################################################################
# Accumulators of one tensor
################################################################################


class Decays(NamedTuple):
    """Decays of the accumulators; numbers, or traced scalars where they are learned.

    Attributes:
      momenta: of the three mean gradients.
      v: of the mean squared gradient.
      factored: of the three factored second moments.
    """

    momenta: tuple[Any, ...] = (0.9, 0.99, 0.999)
    v: Any = 0.999
    factored: tuple[Any, ...] = (0.9, 0.99, 0.999)


class Factored(NamedTuple):
    """Factored second moments of one tensor for three decays, its first axis.

    Attributes:
      row: float32 ``[3, ...]`` with the shape of the tensor without its largest axis. Below two
        axes it has the shape of the tensor itself, and nothing is averaged.
      col: float32 ``[3, ...]`` with the shape of the tensor without its second largest axis. Below
        two axes it is None.
    """

    row: Float[Array, "3 ..."]
    col: jax.Array | None


class Tensor(NamedTuple):
    """The parameters and the accumulators of one tensor, float32.

    Attributes:
      p: parameters ``[...]``.
      momenta: mean gradients for three decays, each ``[...]``.
      v: mean squared gradient ``[...]``.
      factored: factored second moments.
    """

    p: Float[Array, "..."]
    momenta: tuple[jax.Array, ...]
    v: Float[Array, "..."]
    factored: Factored


def accumulate(tensor: Tensor, g: Float[Array, "..."], decays: Decays) -> Tensor:
    """Moves the accumulators of a tensor towards its gradient `g`."""
    momenta = [
        decay * m + (1 - decay) * g for decay, m in zip(decays.momenta, tensor.momenta, strict=True)
    ]
    return tensor._replace(
        momenta=tuple(momenta),
        v=decays.v * tensor.v + (1 - decays.v) * jnp.square(g),
        factored=update_factored(tensor.factored, g, decays.factored),
    )


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the largest and the second largest axis, or None below two axes.

    Of axes of one length, the later counts as larger.
    """
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])  # stable
    return order[-1], order[-2]


def init_factored(zeros: Float[Array, "..."]) -> Factored:
    """Returns second moments of zero.

    Args:
      zeros: zeros with the shape and the sharding of the tensor.
    """
    axes = factored_axes(zeros.shape)
    if axes is None:
        return Factored(row=jnp.stack([zeros] * 3), col=None)
    row, col = (jnp.sum(zeros, axis=axis) for axis in axes)
    return Factored(row=jnp.stack([row] * 3), col=jnp.stack([col] * 3))


def update_factored(factored: Factored, g: jax.Array, decays: Sequence[Any]) -> Factored:
    """Moves the second moments towards those of the gradient `g`."""
    square = jnp.square(g) + 1e-30
    axes = factored_axes(g.shape)

    def move(moment, target):
        shape = (-1, *[1] * target.ndim)
        target = target[None]
        decay = jnp.asarray(decays, jnp.float32).reshape(shape)
        rest = jnp.asarray([1 - d for d in decays], jnp.float32).reshape(shape)
        return decay * moment + rest * target

    if axes is None or factored.col is None:
        return Factored(row=move(factored.row, square), col=None)
    return Factored(
        row=move(factored.row, jnp.mean(square, axis=axes[0])),
        col=move(factored.col, jnp.mean(square, axis=axes[1])),
    )


################################################################################
# Inputs of the per-tensor network
################################################################################


def tensor_statistics(tensor: Tensor) -> jax.Array:
    """Returns the statistics ``[9]`` of one tensor from which `tensor_features` are computed.

    They are the mean of p^2, the mean of v, the mean of each momentum, the variance of v and the
    variance of each momentum.
    """
    accumulators = (tensor.v, *tensor.momenta)
    means = [jnp.mean(x) for x in accumulators]
    variances = [
        jnp.mean(jnp.square(x - mean)) for x, mean in zip(accumulators, means, strict=True)
    ]
    return jnp.stack([jnp.mean(jnp.square(tensor.p)), *means, *variances])


def tensor_features(
    statistics: Float[Array, "n_tensors 9"], ranks: Int[Array, " n_tensors"]
) -> jax.Array:
    """Returns the features of each tensor ``[n_tensors, 12]``: mean_rms, rank, var_m, var_rms.

    v is scaled by the root mean square of p, not by its square, and var_rms is taken around the
    mean of each momentum, not around that of v, because the published weights were trained so.

    Args:
      statistics: ``[n_tensors, 9]`` from `tensor_statistics`.
      ranks: number of axes longer than 1, for each tensor.
    """
    square, mean_v, mean_m, var_v, var_m = jnp.split(statistics, (1, 2, 5, 6), axis=1)
    scale = jax.lax.rsqrt(jnp.maximum(1e-9, square))
    around_m = var_v + jnp.square(mean_v - mean_m)
    rank = jax.nn.one_hot(ranks, _MAX_RANK, dtype=jnp.float32)

    def log_size(x):
        return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10.0 * x)), -5.0, 5.0)

    sizes = (scale * mean_v, scale**2 * var_m, scale**2 * around_m)
    mean_rms, var_m, var_rms = (log_size(size) for size in sizes)
    return jnp.concatenate([mean_rms, rank, var_m, var_rms], axis=1)


################################################################################
# Inputs of the per-parameter network
################################################################################


class Columns(NamedTuple):
    """The 30 inputs of the per-parameter network for one tensor.

    A column that depends only on the row or on the column of the tensor is stored at that size.
    The averaged axis has length 1, so that all three parts broadcast together.

    Attributes:
      dense: 18 arrays of the tensor's shape, groups 0 to 8 and 13.
      row: ``[6, ...]``, groups 9 and 11.
      col: ``[6, ...]``, groups 10 and 12.
    """

    dense: tuple[jax.Array, ...]
    row: Float[Array, "6 ..."]
    col: Float[Array, "6 ..."]


def columns(
    g: Float[Array, "..."], tensor: Tensor, *, v_eps: float = 1e-6, diag_eps: float = 0.0
) -> Columns:
    """Returns the columns of one tensor.

    Args:
      g: gradient of this step.
      tensor: parameters, and accumulators that include `g`.
      v_eps: is added to v before its root is taken.
      diag_eps: is added to the second moments of a tensor below two axes in group 13.
    """
    p, momenta, v, factored = tensor
    r = jax.lax.rsqrt(v + v_eps)
    axes = factored_axes(g.shape)
    if axes is None or factored.col is None:
        row = col = factored.row
        scales_of_g = jax.lax.rsqrt(jnp.maximum(1e-9, row + 1e-9))
        scales_of_m = _rsqrt(row + diag_eps)
    else:
        row = jnp.expand_dims(factored.row, 1 + axes[0])
        col = jnp.expand_dims(factored.col, 1 + axes[1])
        mean = jnp.mean(row, axis=1 + axes[1], keepdims=True)
        left = jax.lax.rsqrt(jnp.maximum(1e-9, row / (mean + 1e-9)))
        right = jax.lax.rsqrt(jnp.maximum(1e-9, col))
        scales_of_g = scales_of_m = [x * y for x, y in zip(left, right, strict=True)]
    dense = (
        g,
        jnp.clip(g, -0.1, 0.1),
        p,
        *momenta,
        v,
        *[m * r for m in momenta],
        r,
        *[g * scale for scale in scales_of_g],
        g * r,
        *[m * scale for m, scale in zip(momenta, scales_of_m, strict=True)],
    )
    return Columns(
        dense=dense,
        row=jnp.concatenate([row, jax.lax.rsqrt(row + 1e-8)]),
        col=jnp.concatenate([col, jax.lax.rsqrt(col + 1e-8)]),
    )


def in_group_order(
    dense: Float[Array, "18 ..."], row: Float[Array, "6 ..."], col: Float[Array, "6 ..."]
) -> Float[Array, "30 ..."]:
    """Orders one entry per column as the bank of networks does.

    Args:
      dense: ``[18, ...]``, entries of `Columns.dense`.
      row: ``[6, ...]``, entries of `Columns.row`.
      col: ``[6, ...]``, entries of `Columns.col`.

    Returns:
      The entries ``[30, ...]`` in the order of `GROUP_SIZES`.
    """
    return jnp.concatenate([dense[:15], row[:3], col[:3], row[3:], col[3:], dense[15:]])


def mean_squares_of(columns: Columns, *, per_matrix: bool = False) -> Float[Array, "30 ..."]:
    """Returns the mean square of each column, in the order of `GROUP_SIZES`.

    Args:
      columns: the columns of a tensor.
      per_matrix: take the means over the last two axes, not over all.

    Returns:
      ``[30]``, or, with `per_matrix` and more than two axes, ``[30, ..., 1, 1]``.
    """
    ndim = columns.dense[0].ndim
    if per_matrix and ndim > 2:
        mean = lambda x: jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True)
        shape = (*columns.dense[0].shape[:-2], 1, 1)
        whole = lambda x: jnp.broadcast_to(x, (x.shape[0], *shape))
        dense = jnp.stack([mean(x) for x in columns.dense])
        return in_group_order(dense, whole(mean(columns.row)), whole(mean(columns.col)))

    def mean_square(x):
        return jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim)))

    return in_group_order(
        mean_squares(columns.dense), mean_square(columns.row), mean_square(columns.col)
    )


@jax.custom_jvp
def mean_squares(arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Returns the mean square ``[k]`` of each of k arrays of one shape, in one pass over memory.

    One reduction with k results reads its inputs once and stores no square. k reductions store
    each square first.
    """
    squares = [jnp.square(x) for x in arrays]
    shape = squares[0].shape
    if len(shape) > 1:  # the first axis is left to be split over threads
        zeros = [jnp.zeros((), x.dtype) for x in squares]
        add = lambda xs, ys: tuple(x + y for x, y in zip(xs, ys, strict=True))
        squares = jax.lax.reduce(squares, zeros, add, tuple(range(1, len(shape))))
    total = jnp.stack(squares)
    return jnp.sum(total, axis=tuple(range(1, total.ndim))) / math.prod(shape)


@mean_squares.defjvp
def _mean_squares_jvp(primals, tangents):
    product = jnp.stack(primals[0]) * jnp.stack(tangents[0])
    return mean_squares(*primals), 2.0 * jnp.mean(product, axis=tuple(range(1, product.ndim)))


@jax.custom_jvp
def _rsqrt(x: jax.Array) -> jax.Array:
    """Returns 1 / sqrt(x), with derivative 0 below 1e-24, where it would overflow float32."""
    return jax.lax.rsqrt(x)


@_rsqrt.defjvp
def _rsqrt_jvp(primals, tangents):
    y = _rsqrt(primals[0])
    return y, -0.5 * jnp.where(primals[0] > 1e-24, y, 0.0) ** 3 * tangents[0]
