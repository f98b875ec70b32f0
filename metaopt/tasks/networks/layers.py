"""Layers shared by the networks: PyTorch's initialisation, a convolution that is fast in loops."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

Init: TypeAlias = Literal["torch", "flax"]
Padding: TypeAlias = Literal["VALID", "SAME"]


def torch_uniform(fan_in: int) -> Callable[..., jax.Array]:
    """The uniform distribution on ``[-1/sqrt(fan_in), 1/sqrt(fan_in)]``.

    It is PyTorch's default for Linear and Conv, biases included (LGL2O, appendix F).

    Args:
      fan_in: number of inputs of each unit.

    Returns:
      An initialiser ``(key, shape, dtype) -> array``.
    """
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        # Drawn as one row: the numbers are the same, and on CPU a small matrix of them, batched by
        # `vmap`, compiles ten times as fast.
        row = jax.random.uniform(key, (math.prod(shape),), dtype, minval=-bound, maxval=bound)
        return row.reshape(shape)

    return init


def initializers(init: Init, fan_in: int) -> tuple[Callable[..., jax.Array], ...]:
    """The initialisers of a layer's kernel and bias.

    Args:
      init: "torch" for PyTorch's, "flax" for Flax's own (LeCun normal and zeros).
      fan_in: number of inputs of each unit.

    Returns:
      The initialiser of the kernel and that of the bias.

    Raises:
      ValueError: when `init` is anything else.
    """
    if init == "torch":
        return torch_uniform(fan_in), torch_uniform(fan_in)
    if init == "flax":
        return nn.initializers.lecun_normal(), nn.initializers.zeros_init()
    raise ValueError(f"init must be 'torch' or 'flax', got {init!r}.")


def dense(features: int, fan_in: int, init: Init = "torch", name: str | None = None) -> nn.Dense:
    """A fully connected layer.

    Args:
      features: number of units.
      fan_in: number of inputs.
      init: PyTorch's initialisation or Flax's.
      name: of the submodule.

    Returns:
      The layer.
    """
    kernel_init, bias_init = initializers(init, fan_in)
    return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init, name=name)


class Conv(nn.Module):
    """Square 2-D convolution, ``[n, H, W, C] -> [n, H', W', features]``.

    Inside a loop, or with one kernel per member of a `vmap`, XLA's convolutions on CPU leave their
    fast path. The form "slices" writes a convolution as shifted slices and one matrix product,
    which has no slow path. docs/scaling.md has the measurements.

    Attributes:
      features: channels of the output.
      kernel: side of the kernel.
      stride: step of the kernel, along both axes.
      padding: "VALID" or "SAME", as in `flax.linen.Conv`.
      use_bias: whether to add a bias per channel.
      init_style: PyTorch's initialisation or Flax's.
      form: "slices", "xla", or "auto": slices on CPU, XLA elsewhere.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: Padding = "VALID"
    use_bias: bool = True
    init_style: Init = "torch"
    form: Literal["auto", "slices", "xla"] = "auto"

    @nn.compact
    def __call__(self, x):
        side, channels = self.kernel, x.shape[-1]
        kernel_init, bias_init = initializers(self.init_style, fan_in=side * side * channels)
        kernel = self.param("kernel", kernel_init, (side, side, channels, self.features))
        x, kernel = promote_dtype(x, kernel)
        on_cpu = jax.default_backend() == "cpu"
        use_slices = self.form == "slices" or (self.form == "auto" and on_cpu)
        convolve = by_slices if use_slices else by_xla
        x = convolve(x, kernel, self.stride, self.padding)
        if self.use_bias:
            x = x + jnp.asarray(self.param("bias", bias_init, (self.features,)), x.dtype)
        return x


def by_xla(
    x: Float[Array, "n height width channels"],
    kernel: Float[Array, "side side channels features"],
    stride: int,
    padding: Padding,
) -> Float[Array, "n new_height new_width features"]:
    """A convolution by XLA's own operation.

    Args:
      x: images.
      kernel: weights.
      stride: step of the kernel, along both axes.
      padding: "VALID" or "SAME".

    Returns:
      The convolved images.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def by_slices(
    x: Float[Array, "n height width channels"],
    kernel: Float[Array, "side side channels features"],
    stride: int,
    padding: Padding,
) -> Float[Array, "n new_height new_width features"]:
    """The same convolution as one matrix product.

    All shifts of the images under the kernel are concatenated along the channels, and multiplied
    by the kernel as one matrix.

    Args:
      x: images.
      kernel: weights.
      stride: step of the kernel, along both axes.
      padding: "VALID" or "SAME".

    Returns:
      The convolved images.
    """
    side = kernel.shape[0]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (side, side), (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = ((size - side) // stride + 1 for size in x.shape[1:3])
    row_extent, column_extent = stride * (height - 1) + 1, stride * (width - 1) + 1
    shifts = [
        x[:, row : row + row_extent : stride, column : column + column_extent : stride]
        for row in range(side)
        for column in range(side)
    ]
    patches = shifts[0] if side == 1 else jnp.concatenate(shifts, axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


class DepthwiseConv(nn.Module):
    """Square 2-D convolution of each channel by a kernel of its own, with "SAME" padding.

    Maps ``[n, H, W, C] -> [n, ceil(H / stride), ceil(W / stride), C]``. XLA's convolutions on CPU
    have no fast path for this; there it is written as a sum of shifted and scaled images.

    Attributes:
      kernel: side of the kernel.
      stride: step of the kernel, along both axes.
      form: "slices", "xla", or "auto": slices on CPU, XLA elsewhere.
    """

    kernel: int
    stride: int = 1
    form: Literal["auto", "slices", "xla"] = "auto"

    @nn.compact
    def __call__(self, x):
        side, channels, strides = self.kernel, x.shape[-1], (self.stride, self.stride)
        kernel_init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", kernel_init, (side, side, 1, channels))
        x, kernel = promote_dtype(x, kernel)
        on_cpu = jax.default_backend() == "cpu"
        if self.form == "xla" or (self.form == "auto" and not on_cpu):
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=strides,
                padding="SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=channels,
            )
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (side, side), strides, "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        height, width = ((size - side) // self.stride + 1 for size in x.shape[1:3])
        rows, columns = (self.stride * (size - 1) + 1 for size in (height, width))
        return sum(
            x[:, i : i + rows : self.stride, j : j + columns : self.stride] * kernel[i, j, 0]
            for i in range(side)
            for j in range(side)
        )
