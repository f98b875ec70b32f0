"""Residual networks (He et al. 2015) with batch norm or group norm."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import flax.linen as nn
import jax.numpy as jnp

from metaopt.tasks.networks.layers import Conv, Init, dense

Norm: TypeAlias = Literal["batch", "group"]
MOMENTUM = 0.9  # of running statistics: the last ten batches count, also in runs of 100 steps


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes change.

    Attributes:
      channels: of the output.
      stride: of the first convolution.
      norm: see `ResNet`.
      init_style: PyTorch's initialisation or Flax's.
    """

    channels: int
    stride: int
    norm: Norm
    init_style: Init

    @nn.compact
    def __call__(self, x, train: bool = False):
        def conv(kernel, stride):
            return Conv(
                features=self.channels,
                kernel=kernel,
                stride=stride,
                padding="SAME",
                use_bias=False,
                init_style=self.init_style,
            )

        y = nn.relu(normalise(self.norm, conv(3, self.stride)(x), train))
        y = normalise(self.norm, conv(3, 1)(y), train)
        if x.shape != y.shape:
            x = normalise(self.norm, conv(1, self.stride)(x), train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, stages of blocks, a global mean, and a linear read-out.

    Maps ``[n, H, W, C] -> [n, num_classes]``. Each stage but the first halves the image. With batch
    norm, the network keeps running statistics in the collection "batch_stats":
    ``net.apply(variables, x, train=True, mutable=["batch_stats"])`` updates them, and without
    `train` they normalise.

    Attributes:
      num_classes: number of outputs.
      blocks: number of blocks of each stage.
      width: channels of the first stage; they double from stage to stage.
      stem: "imagenet" (7x7, stride 2, then max-pooling) or "cifar" (3x3).
      norm: "batch" (running statistics with momentum 0.9) or "group".
      init_style: PyTorch's initialisation or Flax's.
    """

    num_classes: int
    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stem: Literal["imagenet", "cifar"] = "imagenet"
    norm: Norm = "batch"
    init_style: Init = "torch"

    @nn.compact
    def __call__(self, x, train: bool = False):
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        stem = Conv(
            features=self.width,
            kernel=kernel,
            stride=stride,
            padding="SAME",
            use_bias=False,
            init_style=self.init_style,
            name="stem",
        )
        x = nn.relu(normalise(self.norm, stem(x), train))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, num_blocks in enumerate(self.blocks):
            for number in range(num_blocks):
                block = Block(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and number == 0 else 1,
                    norm=self.norm,
                    init_style=self.init_style,
                    name=f"stage{stage}_block{number}",
                )
                x = block(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return dense(self.num_classes, x.shape[-1], self.init_style, name="head")(x)


def normalise(norm: Norm, x, train: bool):
    """Batch norm, or group norm with up to 8 groups; call it in a compact module."""
    if norm == "batch":
        return nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
    if norm == "group":
        return nn.GroupNorm(num_groups=min(8, x.shape[-1]))(x)
    raise ValueError(f"norm must be 'batch' or 'group', got {norm!r}.")


def resnet34(num_classes: int, *, norm: Norm = "batch") -> ResNet:
    """ResNet-34, the optimizee of L3RS, which has 110 arrays of parameters.

    Args:
      num_classes: number of outputs.
      norm: see `ResNet`.

    Returns:
      The network.
    """
    return ResNet(num_classes=num_classes, norm=norm)


def small_resnet(num_classes: int, *, norm: Norm = "group", width: int = 8) -> ResNet:
    """A ResNet for small images that two CPU cores can train: three stages of one block.

    Args:
      num_classes: number of outputs.
      norm: batch or group norm.
      width: channels of the first stage.

    Returns:
      The network.
    """
    return ResNet(num_classes=num_classes, blocks=(1, 1, 1), width=width, stem="cifar", norm=norm)
