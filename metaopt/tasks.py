"""Constructors of tasks and of distributions of tasks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from metaopt.base import Batch, Split, Task
from metaopt.datasets import Dataset, check


def classification(net: nn.Module, data: Dataset, *, batch_size: int = 128) -> Task:
    """Softmax classification of `data` with `net`: mean negative log-likelihood per example.

    Mini-batches are drawn with replacement, ``{"x": [*shape, batch_size, ...], "y": ...}``.
    """
    check(data)
    if batch_size < 1:
        raise ValueError(f"classification: batch_size must be at least 1, got {batch_size}.")

    def init(key):
        return net.init(key, prepare(data.splits["train"]["x"][:1]))["params"]

    def prepare(x):
        return x.astype(jnp.float32) * data.scale

    def logits(params, batch) -> Any:
        return net.apply({"params": params}, prepare(batch["x"]))

    def loss(params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), batch["y"])
        return jnp.mean(losses)

    def accuracy(params, batch):
        return jnp.mean(jnp.argmax(logits(params, batch), axis=-1) == batch["y"])

    def sample(key, shape, split: Split = "train") -> Batch:
        examples = data.splits[split]
        index = jax.random.randint(key, (*shape, batch_size), 0, len(examples["y"]))
        return jax.tree.map(lambda a: a[index], examples)

    def whole(split: Split = "test") -> Batch:
        return data.splits[split]

    return Task(init, loss, sample, whole, accuracy)


def quadratic(
    dim: int = 8, *, condition: float = 10.0, noise: float = 0.1, largest: float = 1.0
) -> Task:
    """``F(x) = sum(h * x^2) / 2 + batch . x``: strongly convex with known constants.

    Eigenvalues h are spaced geometrically in ``[largest / condition, largest]``, so that
    L = `largest` and mu = ``largest / condition``. A batch is a vector ``[dim]`` of noise with
    standard deviation `noise`; `whole` is the noiseless one, whose minimum is 0 at 0.
    """
    if dim < 1:
        raise ValueError(f"quadratic: dim must be at least 1, got {dim}.")
    if condition < 1.0:
        raise ValueError(f"quadratic: condition must be >= 1, got {condition}.")
    h = largest * jnp.geomspace(1.0 / condition, 1.0, dim)

    def sample(key, shape, split: Split = "train") -> Batch:
        del split
        return noise * jax.random.normal(key, (*shape, dim))

    return Task(
        init=lambda key: jax.random.normal(key, (dim,)),
        loss=lambda x, batch: 0.5 * jnp.sum(h * x**2) + jnp.vdot(batch, x),
        sample=sample,
        whole=lambda split="test": jnp.zeros(dim),
    )
