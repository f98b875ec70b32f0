"""Classification of a data set."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.core.types import Batch, Split, Task
from metaopt.datasets import Dataset, check
from metaopt.tasks.scores import at_least_one, scores


def classification(net: nn.Module, data: Dataset, *, batch_size: int = 128) -> Task:
    """Softmax classification of `data` with `net`: mean negative log-likelihood per example.

    Mini-batches are drawn with replacement, ``{"x": [*shape, batch_size, ...], "y": ...}``.
    """
    check(data)
    at_least_one("classification", batch_size=batch_size)

    def sample(key, shape, split: Split = "train") -> Batch:
        examples = data.splits[split]
        index = jax.random.randint(key, (*shape, batch_size), 0, len(examples["y"]))
        return jax.tree.map(lambda a: a[index], examples)

    def whole(split: Split = "test") -> Batch:
        return data.splits[split]

    init, loss, accuracy = classifier(net, data)
    return Task(init, loss, sample, whole, accuracy)


def classifier(net: nn.Module, data: Dataset):
    """(init, loss, accuracy) of a network that sees the scaled inputs of `data`."""

    def prepare(x):
        return x.astype(jnp.float32) * data.scale

    def init(key):
        return net.init(key, prepare(data.splits["train"]["x"][:1]))["params"]

    return init, *scores(lambda params, x: net.apply({"params": params}, prepare(x)))
