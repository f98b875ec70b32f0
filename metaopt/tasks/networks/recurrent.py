"""Recurrent networks."""

import flax.linen as nn
import jax.numpy as jnp

from metaopt.tasks.networks.layers import Init, dense


class GRU(nn.Module):
    """A language model with gated recurrent units (Cho et al. 2014).

    Maps ``[n, T] int -> [n, T, vocabulary]``: logits of the next token, which at position t depend
    on tokens 0..t only.

    Attributes:
      vocabulary: number of tokens.
      width: of the embedding and of the state.
      init_style: PyTorch's initialisation or Flax's, for the read-out.
    """

    vocabulary: int
    width: int = 48
    init_style: Init = "torch"

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width, name="embedding")(tokens)
        x = nn.RNN(nn.GRUCell(self.width, name="cell"), name="rnn")(x)
        return jnp.asarray(dense(self.vocabulary, self.width, self.init_style, name="head")(x))
