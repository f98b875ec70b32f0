"""Residual networks (He et al. 2015) with batch or group norm."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.tasks.networks.layers import Conv, Init, dense

Norm: TypeAlias = Literal["batch", "group"]


class BatchNorm(nn.Module):
    """Batch norm by the statistics of the batch that is given, in training and in evaluation.

    A task is a pure function of params: there are no running averages. Evaluation batches are
    large, so that their statistics are good ones.
    """

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        axes = tuple(range(x.ndim - 1))
        mean, variance = jnp.mean(x, axes), jnp.var(x, axes)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (a 1x1 convolution where shapes change)."""

    channels: int
    stride: int
    norm: Norm
    init_style: Init

    @nn.compact
    def __call__(self, x):
        conv = lambda kernel, stride: Conv(
            self.channels,
            kernel,
            stride,
            padding="SAME",
            use_bias=False,
            init_style=self.init_style,
        )
        y = nn.relu(normalise(self.norm, conv(3, self.stride)(x)))
        y = normalise(self.norm, conv(3, 1)(y))
        if x.shape != y.shape:
            x = normalise(self.norm, conv(1, self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stem, stages of blocks (each but the first halves the image), global mean, read-out.

    Attributes:
      num_classes: outputs.
      blocks: per stage.
      width: channels of the first stage; they double from stage to stage.
      stem: "imagenet" (7x7, stride 2, then max-pooling) or "cifar" (3x3).
      norm: batch or group norm.
      init_style: PyTorch's initialisation or Flax's.
    """

    num_classes: int
    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stem: Literal["imagenet", "cifar"] = "imagenet"
    norm: Norm = "batch"
    init_style: Init = "torch"

    @nn.compact
    def __call__(self, x):
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = Conv(
            self.width,
            kernel,
            stride,
            padding="SAME",
            use_bias=False,
            init_style=self.init_style,
            name="stem",
        )(x)
        x = nn.relu(normalise(self.norm, x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, number in enumerate(self.blocks):
            for block in range(number):
                stride = 2 if stage and not block else 1
                name = f"stage{stage}_block{block}"
                x = Block(self.width * 2**stage, stride, self.norm, self.init_style, name=name)(x)
        x = jnp.mean(x, axis=(1, 2))
        return dense(self.num_classes, x.shape[-1], self.init_style, name="head")(x)


def normalise(norm: Norm, x):
    """Batch norm, or group norm with up to 8 groups; call it inside of a compact module."""
    if norm == "batch":
        return BatchNorm()(x)
    if norm == "group":
        return nn.GroupNorm(num_groups=min(8, x.shape[-1]))(x)
    raise ValueError(f"norm must be 'batch' or 'group', got {norm!r}.")


def resnet34(num_classes: int, *, norm: Norm = "batch") -> ResNet:
    """ResNet-34, the optimizee of L3RS (110 arrays of parameters)."""
    return ResNet(num_classes, norm=norm)


def small_resnet(num_classes: int, *, norm: Norm = "group", width: int = 8) -> ResNet:
    """Three stages of one block on small images: a ResNet that two CPU cores can train."""
    return ResNet(num_classes, (1, 1, 1), width, "cifar", norm)
