"""What VeLO's two networks see: loss, time and tensor statistics, and thirty columns per parameter.

Every function works on one tensor (or on no tensor) in float32 and returns arrays; the formulas
and their sources are in docs/optimizers/velo.md.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAY = 0.999
FACTORED_DECAYS = (0.9, 0.99, 0.999)
NUM_HORIZONS = 10  # running means of the loss
GROUP_SIZES = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)  # columns per group, 30 together
NUM_FEATURES = 30  # of the per-tensor network; the per-parameter network happens to have 30 too

_TIMES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
_MAX_RANK = 5


class LossBuffer(NamedTuple):
    """Running means of the loss over ten horizons, from 10 steps to the whole run.

    Attributes:
      mean: ``[10]``, not bias-corrected.
      low: ``[10]``, the lowest bias-corrected mean so far.
      count: int32 ``[]``, losses seen.
    """

    mean: Float[Array, " 10"]
    low: Float[Array, " 10"]
    count: Int[Array, ""]


def init_loss_buffer() -> LossBuffer:
    return LossBuffer(
        mean=jnp.zeros(NUM_HORIZONS),
        low=jnp.full(NUM_HORIZONS, 999999999999.0, jnp.float32),
        count=jnp.zeros((), jnp.int32),
    )


def update_loss_buffer(
    buffer: LossBuffer, loss: Float[Array, ""], num_steps: jax.Array
) -> tuple[LossBuffer, jax.Array]:
    """The buffer after `loss` and its features ``[9]``: each mean relative to the next slower one.

    With :math:`d = e^{-1/h}` every :math:`1 - d^n` is written as ``-expm1(-n / h)``: at horizons
    of 1e5 steps the plain difference has lost three digits in float32.
    """
    horizon = jnp.exp(jnp.linspace(jnp.log(10.0), jnp.log(num_steps), NUM_HORIZONS))
    count = buffer.count + 1
    correction = -jnp.expm1(-count / horizon)
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
    """``[9]`` soft steps of the fraction of the run that is done."""
    return jnp.tanh(10.0 * (t / num_steps - jnp.asarray(_TIMES)))


def tensor_statistics(
    p: Float[Array, "..."], momenta: tuple[jax.Array, ...], v: Float[Array, "..."]
) -> jax.Array:
    """``[9]``: mean of p^2 and of v, mean of each momentum, variance of v and of each momentum."""
    means = [jnp.mean(x) for x in (v, *momenta)]
    variances = [
        jnp.mean(jnp.square(x - mean)) for x, mean in zip((v, *momenta), means, strict=True)
    ]
    return jnp.stack([jnp.mean(jnp.square(p)), *means, *variances])


def tensor_features(statistics: Float[Array, "n_tensors 9"], ranks: Sequence[int]) -> jax.Array:
    """What the LSTM sees of each tensor, ``[n_tensors, 12]``: mean_rms, rank, var_m, var_rms.

    v is scaled by the root mean square of p, not by its square, and var_rms is taken around the
    mean of each momentum, not around that of v: so were the published weights trained.

    Args:
      statistics: ``[n_tensors, 9]`` from `tensor_statistics`.
      ranks: number of axes longer than 1, for each tensor.
    """
    square, mean_v, mean_m, var_v, var_m = jnp.split(statistics, (1, 2, 5, 6), axis=1)
    scale = jax.lax.rsqrt(jnp.maximum(1e-9, square))
    around_m = var_v + jnp.square(mean_v - mean_m)
    rank = jax.nn.one_hot(jnp.asarray(ranks), _MAX_RANK)
    log_size = lambda x: 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10.0 * x)), -5.0, 5.0)
    sizes = (log_size(x) for x in (scale * mean_v, scale**2 * var_m, scale**2 * around_m))
    mean_rms, *rest = sizes
    return jnp.concatenate([mean_rms, rank, *rest], axis=1)


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Largest and second largest axis, later ones first on ties; None below two axes."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])  # stable
    return order[-1], order[-2]


class Factored(NamedTuple):
    """Running second moments of one tensor; the first axis is the decay (0.9, 0.99, 0.999).

    Attributes:
      row: ``[3, ...]``, the tensor's shape without its largest axis; below two axes the tensor's
        own shape (nothing is averaged).
      col: ``[3, ...]``, the tensor's shape without its second largest axis; below two axes None.
    """

    row: Float[Array, "3 ..."]
    col: jax.Array | None


def init_factored(zeros: Float[Array, "..."]) -> Factored:
    """All zero; `zeros` has the shape and the sharding of the tensor."""
    axes = factored_axes(zeros.shape)
    decays = range(len(FACTORED_DECAYS))
    if axes is None:
        return Factored(row=jnp.stack([zeros for _ in decays]), col=None)
    row, col = (jnp.sum(zeros, axis=axis) for axis in axes)
    return Factored(row=jnp.stack([row for _ in decays]), col=jnp.stack([col for _ in decays]))


def update_factored(old: Factored, g: jax.Array) -> Factored:
    """Moves every second moment towards that of `g`."""
    square = jnp.square(g) + 1e-30
    axes = factored_axes(g.shape)

    def move(moment, target):
        decay = np.reshape(FACTORED_DECAYS, (-1, *[1] * target.ndim))
        return np.float32(decay) * moment + np.float32(1.0 - decay) * target

    if axes is None or old.col is None:
        return Factored(row=move(old.row, square), col=None)
    return Factored(
        row=move(old.row, jnp.mean(square, axis=axes[0])),
        col=move(old.col, jnp.mean(square, axis=axes[1])),
    )


@jax.custom_jvp
def _rsqrt(x: jax.Array) -> jax.Array:
    """rsqrt whose derivative is cut to zero below 1e-24, where it would overflow float32."""
    return jax.lax.rsqrt(x)


@_rsqrt.defjvp
def _rsqrt_jvp(primals, tangents):
    y = _rsqrt(primals[0])
    return y, -0.5 * jnp.where(primals[0] > 1e-24, y, 0.0) ** 3 * tangents[0]


class Columns(NamedTuple):
    """The 30 inputs of the per-parameter network.

    What depends on a row or on a column of the tensor only is kept at that size; the averaged
    axis has length 1, so that all three parts broadcast together.

    Attributes:
      dense: 18 arrays of the tensor's shape, groups 0 to 8 and 13.
      row: ``[6, ...]``, groups 9 and 11.
      col: ``[6, ...]``, groups 10 and 12.
    """

    dense: tuple[jax.Array, ...]
    row: Float[Array, "6 ..."]
    col: Float[Array, "6 ..."]


def in_group_order(
    dense: Float[Array, " 18"], row: Float[Array, " 6"], col: Float[Array, " 6"]
) -> Float[Array, " 30"]:
    """One number per column, dense ``[18]``, row and col ``[6]``, as the bank orders them."""
    return jnp.concatenate([dense[:15], row[:3], col[:3], row[3:], col[3:], dense[15:]])


def columns(
    g: jax.Array,
    p: Float[Array, "..."],
    momenta: tuple[jax.Array, ...],
    v: Float[Array, "..."],
    fac: Factored,
) -> Columns:
    """The columns of one tensor from this step's gradient and accumulators."""
    r = jax.lax.rsqrt(v + 1e-6)
    axes = factored_axes(g.shape)
    if axes is None or fac.col is None:
        row = col = fac.row
        of_gradient = jax.lax.rsqrt(jnp.maximum(1e-9, row + 1e-9))
        of_momenta = _rsqrt(row)
    else:
        row, col = (
            jnp.expand_dims(x, 1 + axis) for x, axis in zip((fac.row, fac.col), axes, strict=True)
        )
        mean = jnp.mean(row, axis=1 + axes[1], keepdims=True)
        left = jax.lax.rsqrt(jnp.maximum(1e-9, row / (mean + 1e-9)))
        right = jax.lax.rsqrt(jnp.maximum(1e-9, col))
        of_gradient = of_momenta = [x * y for x, y in zip(left, right, strict=True)]
    dense = (
        *(g, jnp.clip(g, -0.1, 0.1), p),
        *momenta,
        v,
        *(m * r for m in momenta),
        r,
        *(g * x for x in of_gradient),
        g * r,
        *(m * x for m, x in zip(momenta, of_momenta, strict=True)),
    )
    row, col = (jnp.concatenate([x, jax.lax.rsqrt(x + 1e-8)]) for x in (row, col))
    return Columns(dense=dense, row=row, col=col)


@jax.custom_jvp
def mean_squares(arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Mean square of each of k arrays of one shape, ``[k]``, in one pass over memory.

    One reduction with k results reads its inputs once and stores no square; k reductions each
    store theirs first.
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
