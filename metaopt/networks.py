"""The networks that are optimized: Linen modules with PyTorch-style initialisation."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for Linear and Conv (LGL2O, appendix F).
torch_kernel = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _torch_bias(fan_in: int):
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class MLP(nn.Module):
    """Fully connected layers on flattened inputs.

    Attributes:
      features: units of each hidden layer, then of the output.
      activation: between layers.
    """

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x):
        x = x.reshape((x.shape[0], -1))
        for layer, units in enumerate(self.features):
            if layer:
                x = self.activation(x)
            x = nn.Dense(units, kernel_init=torch_kernel, bias_init=_torch_bias(x.shape[-1]))(x)
        return x


class CNN(nn.Module):
    """Strided convolutions (VALID, ReLU, no pooling) and a linear read-out.

    The default is CNN-3 of LGL2O section 4.3 and Meta Guard A.1.
    """

    num_classes: int
    channels: Sequence[int] = (8, 16, 32)
    kernels: Sequence[int] = (5, 3, 3)
    strides: Sequence[int] = (2, 2, 2)

    @nn.compact
    def __call__(self, x):
        for channels, kernel, stride in zip(self.channels, self.kernels, self.strides, strict=True):
            x = nn.Conv(
                channels,
                (kernel, kernel),
                (stride, stride),
                padding="VALID",
                kernel_init=torch_kernel,
                bias_init=_torch_bias(kernel * kernel * x.shape[-1]),
            )(x)
            x = nn.relu(x)
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(
            self.num_classes, kernel_init=torch_kernel, bias_init=_torch_bias(x.shape[-1])
        )(x)
