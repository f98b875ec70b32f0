"""Autoencoders: a network gives back its inputs."""

from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from metaopt.core.types import Batch, Key, Params, Split, Task
from metaopt.datasets import Dataset, check
from metaopt.tasks.classification import drawn
from metaopt.tasks.scores import at_least_one, in_chunks

Splits: TypeAlias = dict[Split, Batch]


def autoencoder(net: nn.Module, data: Dataset, *, batch_size: int = 128) -> Task:
    """Reconstruction of the inputs of `data` with `net`: mean squared error per number.

    Mini-batches are drawn as in `metaopt.tasks.classification`; labels are not used. The task has
    no accuracy.

    Args:
      net: a network with one mode that returns as many numbers per example as its input has, such
        as ``networks.MLP((128, 16, 128, 784))``.
      data: the data set.
      batch_size: examples of a mini-batch.

    Raises:
      ValueError: `data` is no usable data set, or `batch_size` is below 1; at the loss, when
        the output of `net` has another size than its input.
    """
    check(data)
    at_least_one("autoencoder", batch_size=batch_size)
    scale = data.scale

    def prepare(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) * scale

    def init(splits: Splits, key: Key) -> Params:
        return net.init(key, prepare(splits["train"]["x"][:1]))["params"]

    def error(params: Params, batch: Batch) -> jax.Array:
        x = prepare(batch["x"])
        output = jnp.asarray(net.apply({"params": params}, x))
        if output.size != x.size:
            raise ValueError(
                f"autoencoder: net returns {output.size // len(x)} numbers per example; make it "
                f"return {x.size // len(x)}, as many as an example of {data.name!r} has."
            )
        return jnp.mean(jnp.square(output.reshape(x.shape) - x))

    mean_error = in_chunks(error)

    def loss(splits: Splits, params: Params, batch: Batch) -> jax.Array:
        del splits
        return mean_error(params, batch)

    def sample(splits: Splits, key: Key, shape: tuple[int, ...], split: Split) -> Batch:
        return drawn(splits[split], key, (*shape, batch_size))

    def whole(splits: Splits, split: Split) -> Batch:
        return splits[split]

    return Task(
        init=init,
        loss=loss,
        sample=sample,
        whole=whole,
        data=jax.tree.map(jnp.asarray, data.splits),
    )
