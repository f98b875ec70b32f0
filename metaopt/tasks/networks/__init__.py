"""The networks that are optimized: Linen modules with PyTorch-style initialisation."""

from metaopt.core.tensor_files import read_safetensors as read_safetensors
from metaopt.core.tensor_files import read_torch as read_torch
from metaopt.tasks.networks.efficientnet import EfficientNetLite0 as EfficientNetLite0
from metaopt.tasks.networks.efficientnet import (
    load_efficientnet_lite0 as load_efficientnet_lite0,
)
from metaopt.tasks.networks.layers import Conv as Conv
from metaopt.tasks.networks.layers import Init as Init
from metaopt.tasks.networks.layers import dense as dense
from metaopt.tasks.networks.minilm import MiniLM as MiniLM
from metaopt.tasks.networks.minilm import load_minilm_l6_v2 as load_minilm_l6_v2
from metaopt.tasks.networks.plain import CNN as CNN
from metaopt.tasks.networks.plain import MLP as MLP
from metaopt.tasks.networks.plain import cnn5 as cnn5
from metaopt.tasks.networks.recurrent import GRU as GRU
from metaopt.tasks.networks.resnet import Norm as Norm
from metaopt.tasks.networks.resnet import ResNet as ResNet
from metaopt.tasks.networks.resnet import resnet34 as resnet34
from metaopt.tasks.networks.resnet import small_resnet as small_resnet
from metaopt.tasks.networks.transformer import Transformer as Transformer
from metaopt.tasks.networks.transformer import ViT as ViT
from metaopt.tasks.networks.weights import Pretrained as Pretrained
