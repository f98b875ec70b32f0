"""Layers shared by the networks: PyTorch's initialisation, a convolution that is fast in loops."""

import math
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

Init: TypeAlias = Literal["torch", "flax"]
Padding: TypeAlias = Literal["VALID", "SAME"]


def torch_uniform(fan_in: int):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for Linear and Conv, biases included.

    LGL2O, appendix F. The numbers are drawn as one row: the same ones, and on CPU a small matrix
    of them, batched by `vmap`, compiles ten times as fast.
    """
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)

    return init


def initializers(init: Init, fan_in: int):
    """(kernel, bias) initialisers: PyTorch's, or Flax's own (LeCun normal and zeros)."""
    if init == "torch":
        return torch_uniform(fan_in), torch_uniform(fan_in)
    if init == "flax":
        return nn.initializers.lecun_normal(), nn.initializers.zeros_init()
    raise ValueError(f"init must be 'torch' or 'flax', got {init!r}.")


def dense(features: int, fan_in: int, init: Init = "torch", name: str | None = None) -> nn.Dense:
    """A fully connected layer on `fan_in` inputs."""
    kernel, bias = initializers(init, fan_in)
    return nn.Dense(features, kernel_init=kernel, bias_init=bias, name=name)


class Conv(nn.Module):
    """Square 2-D convolution, ``[n, H, W, C] -> [n, H', W', features]``.

    Inside of a loop, or with a kernel per member of a `vmap`, XLA's convolutions on CPU leave
    their fast path. There it is written as shifted slices and one matrix product, which has no
    slow path; elsewhere it is XLA's own. docs/scaling.md has the measurements.

    Attributes:
      features, kernel, stride, padding: as in `flax.linen.Conv`, one number for both axes.
      use_bias: whether to add a bias per feature.
      init_style: PyTorch's initialisation or Flax's.
      form: "slices", "xla", or "auto" (slices on CPU).
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
        k, channels = self.kernel, x.shape[-1]
        kernel_init, bias_init = initializers(self.init_style, k * k * channels)
        kernel = self.param("kernel", kernel_init, (k, k, channels, self.features))
        x, kernel = promote_dtype(x, kernel)
        on_cpu = self.form == "auto" and jax.default_backend() == "cpu"
        convolve = by_slices if on_cpu or self.form == "slices" else by_xla
        x = convolve(x, kernel, self.stride, self.padding)
        if self.use_bias:
            x = x + jnp.asarray(self.param("bias", bias_init, (self.features,)), x.dtype)
        return x


def by_xla(x, kernel, stride: int, padding: Padding):
    """XLA's convolution, ``[n, H, W, C], [k, k, C, F] -> [n, H', W', F]``."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def by_slices(x, kernel, stride: int, padding: Padding):
    """The same: every shift of the image side by side, times the kernel as one matrix."""
    k = kernel.shape[0]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (k, k), (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height, width = ((n - k) // stride + 1 for n in x.shape[1:3])
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    shifted = [
        x[:, i : i + rows : stride, j : j + columns : stride] for i in range(k) for j in range(k)
    ]
    patches = shifted[0] if k == 1 else jnp.concatenate(shifted, axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])
