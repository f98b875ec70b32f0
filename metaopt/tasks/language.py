"""Language modelling on characters."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.core.types import Batch, Split, Task
from metaopt.datasets import Text
from metaopt.tasks.scores import at_least_one, scores


def language_model(
    net: nn.Module, text: Text, *, batch_size: int = 32, length: int = 64, held_out: int = 64
) -> Task:
    """Next-character prediction: mean negative log-likelihood per character, in nats.

    Mini-batches are windows of the text at random places, ``{"x": [*shape, batch_size, length],
    "y": the same, one character on}``. A whole split is its first `held_out` windows, side by
    side; accuracy is the share of characters predicted right.
    """
    at_least_one("language_model", batch_size=batch_size, length=length, held_out=held_out)
    shortest = min(len(tokens) for tokens in text.splits.values())
    if length + 1 > shortest:
        raise ValueError(
            f"language_model: length must be below {shortest}, the shortest split of "
            f"{text.name!r}, got {length}."
        )

    def windows(tokens, starts) -> Batch:
        index = starts[..., None] + jnp.arange(length)
        return {"x": tokens[index], "y": tokens[index + 1]}

    def sample(key, shape, split: Split = "train") -> Batch:
        tokens = text.splits[split]
        last = len(tokens) - length
        return windows(tokens, jax.random.randint(key, (*shape, batch_size), 0, last))

    def whole(split: Split = "test") -> Batch:
        tokens = text.splits[split]
        number = min(held_out, (len(tokens) - 1) // length)
        return windows(tokens, length * jnp.arange(number))

    init = lambda key: net.init(key, jnp.zeros((1, length), jnp.int32))["params"]
    loss, accuracy = scores(lambda params, x: net.apply({"params": params}, x))
    return Task(init, loss, sample, whole, accuracy)
