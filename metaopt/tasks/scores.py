"""Losses and accuracies that tasks share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_integer
from metaopt.core.types import Batch, Params

CHUNK = 1000  # examples of a whole split that go through a network at once


def negative_log_likelihood(
    logits: Float[Array, "... classes"], labels: Int[Array, "..."]
) -> jax.Array:
    """Per example, ``[..., classes], [...] int -> [...]``; exact for logits of any finite size.

    The largest logit is subtracted first. ``logsumexp(logits) - logits[label]`` would be 0 for
    logits that are all 1e30, as if a network that has blown up were a perfect one.
    """
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -jnp.squeeze(chosen, axis=-1)


def scores(logits: Callable[[Params, Any], Any]):
    """(loss, accuracy) of ``logits(params, x)`` against the labels of a batch."""

    def loss(params, batch):
        return jnp.mean(negative_log_likelihood(logits(params, batch["x"]), batch["y"]))

    def accuracy(params, batch):
        return jnp.mean(jnp.argmax(logits(params, batch["x"]), axis=-1) == batch["y"])

    return in_chunks(loss), in_chunks(accuracy)


def in_chunks(mean: Callable[[Params, Batch], jax.Array]):
    """A mean over examples, taken over equal parts of a large batch to bound memory."""

    def chunked(params, batch):
        number = len(batch["y"])
        if number <= CHUNK or number % CHUNK:
            return mean(params, batch)
        parts = jax.tree.map(lambda a: a.reshape(-1, CHUNK, *a.shape[1:]), batch)
        return jnp.mean(jax.lax.map(lambda part: mean(params, part), parts))

    return chunked


def at_least_one(name: str, **arguments: int) -> None:
    """Raises `ValueError` for the first argument that is no integer, or below 1."""
    for argument, value in arguments.items():
        check_integer(f"{name}: {argument}", value, 1)
