"""A small pre-norm transformer language model (GPT-2's layout)."""

import flax.linen as nn
import jax.numpy as jnp

from metaopt.tasks.networks.layers import Init, dense


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
        mask = nn.make_causal_mask(tokens)
        for layer in range(self.layers):
            h = nn.LayerNorm(name=f"norm{layer}_1")(x)
            attention = nn.MultiHeadDotProductAttention(self.heads, name=f"attention{layer}")
            x = x + attention(h, mask=mask)
            h = nn.LayerNorm(name=f"norm{layer}_2")(x)
            expand = dense(4 * self.width, self.width, self.init_style, name=f"expand{layer}")
            contract = dense(self.width, 4 * self.width, self.init_style, name=f"contract{layer}")
            x = x + contract(nn.gelu(expand(h)))
        x = nn.LayerNorm(name="norm")(x)
        return jnp.asarray(dense(self.vocabulary, self.width, self.init_style, name="head")(x))
