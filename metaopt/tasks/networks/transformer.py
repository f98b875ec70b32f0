"""Small pre-norm transformers (GPT-2's layout): a language model and an image classifier."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.tasks.networks.layers import Conv, Init, dense


class Transformer(nn.Module):
    """Logits of the next token, ``[n, T] int -> [n, T, vocabulary]``.

    The logits at position t depend on tokens 0..t only.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream.
      layers: number of blocks.
      heads: attention heads of each block.
      max_length: largest T.
      init_style: PyTorch's initialisation or Flax's, for the read-out and the MLPs.
    """

    vocabulary: int
    width: int = 32
    layers: int = 2
    heads: int = 2
    max_length: int = 64
    init_style: Init = "torch"

    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"Transformer: {length} tokens, but max_length is {self.max_length}; give shorter "
                "text or a larger max_length."
            )
        position = self.param(
            "position", nn.initializers.normal(0.02), (self.max_length, self.width)
        )
        x = nn.Embed(self.vocabulary, self.width, name="embedding")(tokens) + position[:length]
        x = blocks(x, self.layers, self.heads, self.init_style, mask=nn.make_causal_mask(tokens))
        return jnp.asarray(dense(self.vocabulary, self.width, self.init_style, name="head")(x))


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020), ``[n, H, W, C] -> [n, num_classes]``.

    The image is cut into patches; the mean over these, after the last block, is read out.

    Attributes:
      num_classes: number of outputs.
      patch: side of a patch in pixels; H and W must be multiples of it.
      width: of the residual stream.
      layers: number of blocks.
      heads: attention heads of each block.
      init_style: PyTorch's initialisation or Flax's, for the patches, the read-out and the MLPs.
    """

    num_classes: int
    patch: int = 7
    width: int = 32
    layers: int = 2
    heads: int = 2
    init_style: Init = "torch"

    @nn.compact
    def __call__(self, x):
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"ViT: images of {height}x{width} pixels are not whole patches of {self.patch}; "
                "give another patch, or resize the images."
            )
        patches = Conv(
            features=self.width,
            kernel=self.patch,
            stride=self.patch,
            init_style=self.init_style,
            name="patches",
        )(x)
        tokens = patches.reshape((x.shape[0], -1, self.width))
        position = self.param("position", nn.initializers.normal(0.02), tokens.shape[1:])
        x = blocks(tokens + position, self.layers, self.heads, self.init_style)
        x = jnp.mean(x, axis=1)
        return jnp.asarray(dense(self.num_classes, self.width, self.init_style, name="head")(x))


def blocks(
    x: jax.Array, layers: int, heads: int, init_style: Init, mask: jax.Array | None = None
) -> jax.Array:
    """Blocks of attention and MLP on ``[n, T, width]``, and a norm; call it in compact modules."""
    width = x.shape[-1]
    for layer in range(layers):
        h = nn.LayerNorm(name=f"norm{layer}_1")(x)
        attention = nn.MultiHeadDotProductAttention(heads, name=f"attention{layer}")
        x = x + attention(h, mask=mask)
        h = nn.LayerNorm(name=f"norm{layer}_2")(x)
        expand = dense(4 * width, width, init_style, name=f"expand{layer}")
        contract = dense(width, 4 * width, init_style, name=f"contract{layer}")
        x = x + contract(nn.gelu(expand(h)))
    return nn.LayerNorm(name="norm")(x)
