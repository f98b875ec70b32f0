"""Losses and accuracies that tasks share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_integer

CHUNK = 1000  # examples that go through a network at once


def negative_log_likelihood(
    logits: Float[Array, "... classes"], labels: Int[Array, "..."]
) -> jax.Array:
    """Negative log-likelihood of each example, ``[...]``; exact for finite logits of any size.

    The largest logit is subtracted first. ``logsumexp(logits) - logits[label]`` would be 0 for
    logits that are all 1e30: a diverged network would have a loss of 0.
    """
    of_label = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -jnp.squeeze(of_label, axis=-1)


def scores(
    logits: Callable[..., Any],
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """``(params, batch) -> loss`` and ``(params, batch) -> accuracy`` of a classifier.

    Args:
      logits: ``(params, x) -> [..., classes]``; the batch holds inputs "x" and labels "y". All
        three functions have a second argument, the model state, if `logits` has.
    """

    def loss(*arguments_and_batch):
        *arguments, batch = arguments_and_batch
        return jnp.mean(negative_log_likelihood(logits(*arguments, batch["x"]), batch["y"]))

    def accuracy(*arguments_and_batch):
        *arguments, batch = arguments_and_batch
        return jnp.mean(jnp.argmax(logits(*arguments, batch["x"]), axis=-1) == batch["y"])

    return in_chunks(loss), in_chunks(accuracy)


def in_chunks(mean: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A mean over examples that takes a large batch in equal parts, to bound memory."""

    def chunked(*arguments_and_batch):
        *arguments, batch = arguments_and_batch
        examples = {name: batch[name] for name in batch if name in ("x", "y")}
        number = len(examples["y"])
        if number <= CHUNK or number % CHUNK:
            return mean(*arguments, examples)
        parts = jax.tree.map(lambda a: a.reshape(-1, CHUNK, *a.shape[1:]), examples)
        return jnp.mean(jax.lax.map(lambda part: mean(*arguments, part), parts))

    return chunked


def at_least_one(name: str, **arguments: int) -> None:
    """Raises `ValueError` for the first argument that is not an integer of at least 1."""
    for argument, value in arguments.items():
        check_integer(f"{name}: {argument}", value, 1)
