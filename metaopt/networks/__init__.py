"""The networks that are optimized: Linen modules with PyTorch-style initialisation."""

from metaopt.networks.layers import Conv as Conv
from metaopt.networks.layers import Init as Init
from metaopt.networks.layers import dense as dense
from metaopt.networks.plain import CNN as CNN
from metaopt.networks.plain import MLP as MLP
from metaopt.networks.plain import cnn5 as cnn5
from metaopt.networks.resnet import Norm as Norm
from metaopt.networks.resnet import ResNet as ResNet
from metaopt.networks.resnet import resnet34 as resnet34
from metaopt.networks.resnet import small_resnet as small_resnet
from metaopt.networks.transformer import Transformer as Transformer
