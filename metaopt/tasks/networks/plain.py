"""Plain networks, without shortcuts or normalisation: the optimizees of LGL2O and Meta Guards."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from metaopt.tasks.networks.layers import Conv, Init, dense


class MLP(nn.Module):
    """A multi-layer perceptron, ``[n, ...] -> [n, features[-1]]``; inputs are flattened.

    Attributes:
      features: units of each hidden layer, then of the output.
      activation: the function between layers.
      init_style: PyTorch's initialisation or Flax's.
    """

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    init_style: Init = "torch"

    @nn.compact
    def __call__(self, x):
        x = x.reshape((x.shape[0], -1))
        for layer, units in enumerate(self.features):
            if layer > 0:
                x = self.activation(x)
            x = dense(units, x.shape[-1], self.init_style, name=f"Dense_{layer}")(x)
        return x


class CNN(nn.Module):
    """Strided convolutions without padding or pooling, and a linear read-out.

    Maps ``[n, H, W, C] -> [n, num_classes]``. The default is CNN-3 of LGL2O section 4.3 and of
    Meta Guards A.1.

    Attributes:
      num_classes: number of outputs.
      channels: of each convolution.
      kernels: side of each convolution's kernel.
      strides: of each convolution.
      init_style: PyTorch's initialisation or Flax's.
      activation: the function after each convolution.
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
            conv = Conv(
                features=channels,
                kernel=kernel,
                stride=stride,
                init_style=self.init_style,
                name=f"Conv_{layer}",
            )
            x = self.activation(conv(x))
        x = x.reshape((x.shape[0], -1))
        return dense(self.num_classes, x.shape[-1], self.init_style, name="Dense_0")(x)


def cnn5(num_classes: int) -> CNN:
    """CNN-5 of LGL2O section 4.5; 97 442 parameters on Tiny ImageNet with 50 classes.

    Args:
      num_classes: number of outputs.

    Returns:
      The network.
    """
    return CNN(
        num_classes=num_classes,
        channels=(8, 16, 32, 32, 64),
        kernels=(3, 3, 3, 3, 1),
        strides=(2, 2, 2, 1, 1),
    )
