"""Classification of a data set."""

from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.core.types import Batch, Key, Split, Task
from metaopt.datasets import Dataset, check
from metaopt.tasks.modules import Classifier, classifier
from metaopt.tasks.scores import at_least_one

Splits: TypeAlias = dict[Split, Batch]


def classification(net: nn.Module, data: Dataset, *, batch_size: int = 128) -> Task:
    """Softmax classification of `data` with `net`: mean negative log-likelihood per example.

    Mini-batches are drawn with replacement, ``{"x": [*shape, batch_size, ...], "y": ...}``. The
    splits of `data` are the leaves of the task.

    A network with two modes has an argument `train` in its ``__call__``. The loss calls it with
    ``train=True``; held-out losses and accuracies are those of ``train=False``. Its collections
    besides "params", such as BatchNorm's running statistics, are the model state of the task. If it
    draws random numbers, as dropout does, a mini-batch also holds a PRNG key, ``"key": [*shape]``.

    Args:
      net: a network that returns logits ``[n, num_classes]``.
      data: the data set.
      batch_size: examples of a mini-batch.

    Raises:
      ValueError: `data` is no usable data set, or `batch_size` is below 1; at `init`, when `net`
        has a state, but no argument `train`.
    """
    check(data)
    at_least_one("classification", batch_size=batch_size)
    functions = dataset_classifier("classification", net, data)

    def sample(splits: Splits, key: Key, shape: tuple[int, ...], split: Split) -> Batch:
        return functions.with_keys(drawn(splits[split], key, (*shape, batch_size)), key, shape)

    def whole(splits: Splits, split: Split) -> Batch:
        return splits[split]

    return functions.task(
        lambda splits: splits["train"]["x"][:1],
        sample,
        whole,
        data=jax.tree.map(jnp.asarray, data.splits),
    )


def drawn(examples: Batch, key: Key, shape: tuple[int, ...]) -> Batch:
    """Examples ``[*shape, ...]`` of a split, drawn with replacement."""
    index = jax.random.randint(key, shape, 0, len(examples["y"]))
    return jax.tree.map(lambda a: a[index], examples)


def dataset_classifier(where: str, net: nn.Module, data: Dataset) -> Classifier:
    """The functions of a network that sees the scaled inputs of `data`; see `classifier`."""
    scale = data.scale
    example = jax.ShapeDtypeStruct((1, *data.splits["train"]["x"].shape[1:]), jnp.float32)
    return classifier(where, net, example, lambda x: x.astype(jnp.float32) * scale)
