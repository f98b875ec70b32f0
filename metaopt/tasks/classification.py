"""Classification of a data set."""

from collections.abc import Callable
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.core.types import Batch, Key, Params, Split, Task
from metaopt.datasets import Dataset, check
from metaopt.tasks.scores import at_least_one, scores

Splits: TypeAlias = dict[Split, Batch]


def classification(net: nn.Module, data: Dataset, *, batch_size: int = 128) -> Task:
    """Softmax classification of `data` with `net`: mean negative log-likelihood per example.

    Mini-batches are drawn with replacement, ``{"x": [*shape, batch_size, ...], "y": ...}``. The
    splits of `data` are the leaves of the task.

    Args:
      net: a network that returns logits ``[n, num_classes]``.
      data: the data set.
      batch_size: examples of a mini-batch.

    Raises:
      ValueError: `data` is no usable data set, or `batch_size` is below 1.
    """
    check(data)
    at_least_one("classification", batch_size=batch_size)
    fresh_params, loss, accuracy = classifier(net, data)

    def init(splits: Splits, key: Key) -> Params:
        return fresh_params(key, splits["train"]["x"][:1])

    def sample(splits: Splits, key: Key, shape: tuple[int, ...], split: Split) -> Batch:
        examples = splits[split]
        index = jax.random.randint(key, (*shape, batch_size), 0, len(examples["y"]))
        return jax.tree.map(lambda a: a[index], examples)

    def whole(splits: Splits, split: Split) -> Batch:
        return splits[split]

    return Task(
        init=init,
        loss=lambda splits, params, batch: loss(params, batch),
        sample=sample,
        whole=whole,
        accuracy=lambda splits, params, batch: accuracy(params, batch),
        data=jax.tree.map(jnp.asarray, data.splits),
    )


def classifier(
    net: nn.Module, data: Dataset
) -> tuple[Callable[..., Params], Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The functions of a network that sees the scaled inputs of `data`; they hold no arrays.

    Returns:
      ``(key, inputs) -> params``; ``(params, batch) -> loss``; ``(params, batch) -> accuracy``.
    """
    scale = data.scale

    def prepare(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) * scale

    def fresh_params(key: Key, x: jax.Array) -> Params:
        return net.init(key, prepare(x))["params"]

    loss, accuracy = scores(lambda params, x: net.apply({"params": params}, prepare(x)))
    return fresh_params, loss, accuracy
