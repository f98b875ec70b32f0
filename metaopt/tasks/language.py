"""Language modelling on characters."""

from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.core.types import Batch, Key, Split, Task
from metaopt.datasets import Text
from metaopt.tasks.modules import classifier
from metaopt.tasks.scores import at_least_one

Splits: TypeAlias = dict[Split, jax.Array]


def language_model(
    net: nn.Module, text: Text, *, batch_size: int = 32, length: int = 64, held_out: int = 64
) -> Task:
    """Next-character prediction: mean negative log-likelihood per character, in nats.

    Mini-batches are windows of the text at random places: ``x [*shape, batch_size, length]``, and
    ``y``, the same windows one character later. A whole split is its first `held_out` windows
    without overlap. Accuracy is the share of characters that are predicted correctly. A network
    with two modes, such as one with dropout, is used as in `metaopt.tasks.classification`.

    Args:
      net: a network that returns logits ``[n, length, vocabulary]`` for tokens ``[n, length]``.
      text: the text.
      batch_size: windows of a mini-batch.
      length: characters of a window.
      held_out: windows of a whole split.

    Raises:
      ValueError: a number is below 1, or a split of the text is too short.
    """
    at_least_one("language_model", batch_size=batch_size, length=length, held_out=held_out)
    shortest = min(len(tokens) for tokens in text.splits.values())
    if length + 1 > shortest:
        raise ValueError(
            f"language_model: length must be below {shortest}, the shortest split of "
            f"{text.name!r}, got {length}."
        )

    def windows(tokens: jax.Array, starts: jax.Array) -> Batch:
        index = starts[..., None] + jnp.arange(length)
        return {"x": tokens[index], "y": tokens[index + 1]}

    example = jnp.zeros((1, length), jnp.int32)
    functions = classifier("language_model", net, example)

    def sample(splits: Splits, key: Key, shape: tuple[int, ...], split: Split) -> Batch:
        tokens = splits[split]
        last = len(tokens) - length
        batch = windows(tokens, jax.random.randint(key, (*shape, batch_size), 0, last))
        return functions.with_keys(batch, key, shape)

    def whole(splits: Splits, split: Split) -> Batch:
        tokens = splits[split]
        number = min(held_out, (len(tokens) - 1) // length)
        return windows(tokens, length * jnp.arange(number))

    return functions.task(lambda splits: example, sample, whole, data=text.splits)
