"""MLPs and strided CNNs: the optimizees of LGL2O and of the Meta Guards."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from metaopt.tasks.networks.layers import Conv, Init, dense


class MLP(nn.Module):
    """Fully connected layers on flattened inputs.

    Attributes:
      features: units of each hidden layer, then of the output.
      activation: between layers.
      init_style: PyTorch's initialisation or Flax's.
    """

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    init_style: Init = "torch"

    @nn.compact
    def __call__(self, x):
        x = x.reshape((x.shape[0], -1))
        for layer, units in enumerate(self.features):
            if layer:
                x = self.activation(x)
            x = dense(units, x.shape[-1], self.init_style, name=f"Dense_{layer}")(x)
        return x


class CNN(nn.Module):
    """Strided convolutions (VALID, no pooling) with an activation, and a linear read-out.

    The default is CNN-3 of LGL2O section 4.3 and Meta Guard A.1.
    """

    num_classes: int
    channels: Sequence[int] = (8, 16, 32)
    kernels: Sequence[int] = (5, 3, 3)
    strides: Sequence[int] = (2, 2, 2)
    init_style: Init = "torch"
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x):
        layers = zip(self.channels, self.kernels, self.strides, strict=True)
        for layer, (channels, kernel, stride) in enumerate(layers):
            x = Conv(channels, kernel, stride, init_style=self.init_style, name=f"Conv_{layer}")(x)
            x = self.activation(x)
        x = x.reshape((x.shape[0], -1))
        return dense(self.num_classes, x.shape[-1], self.init_style, name="Dense_0")(x)


def cnn5(num_classes: int) -> CNN:
    """CNN-5 of LGL2O section 4.5 (TinyImageNet with 50 classes: 97 442 parameters)."""
    return CNN(num_classes, (8, 16, 32, 32, 64), (3, 3, 3, 3, 1), (2, 2, 2, 1, 1))
