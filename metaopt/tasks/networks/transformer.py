"""A small pre-norm transformer language model (GPT-2's layout)."""

import flax.linen as nn
import jax.numpy as jnp

from metaopt.tasks.networks.layers import Init, dense


class Transformer(nn.Module):
    """Next-token logits, ``[n, T] int -> [n, T, vocabulary]``; position t sees tokens 0..t only.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream.
      layers, heads: blocks, and attention heads in each.
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
        x = nn.Embed(self.vocabulary, self.width, name="embedding")(tokens)
        position = self.param(
            "position", nn.initializers.normal(0.02), (self.max_length, self.width)
        )
        x = x + position[:length]
        mask = nn.make_causal_mask(tokens)
        for layer in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads, name=f"attention{layer}")
            x = x + attention(nn.LayerNorm(name=f"norm{layer}_1")(x), mask=mask)
            h = nn.LayerNorm(name=f"norm{layer}_2")(x)
            h = nn.gelu(
                dense(4 * self.width, self.width, self.init_style, name=f"expand{layer}")(h)
            )
            x = x + dense(self.width, 4 * self.width, self.init_style, name=f"contract{layer}")(h)
        x = nn.LayerNorm(name="norm")(x)
        return jnp.asarray(dense(self.vocabulary, self.width, self.init_style, name="head")(x))
