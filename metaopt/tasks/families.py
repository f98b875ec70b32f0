"""Distributions of tasks that differ in data set, width and batch size, in arrays of one shape."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.types import Batch, Key, Params, Split, Task, TaskFamily
from metaopt.datasets import Dataset, check
from metaopt.tasks.networks import MLP
from metaopt.tasks.scores import negative_log_likelihood

# Of each split: x [D, n, ...], y [D, n] and how many examples count [D], of D data sets.
Stacked: TypeAlias = dict[Split, tuple[jax.Array, jax.Array, jax.Array]]


def mlp_family(
    sets: Sequence[Dataset],
    *,
    widths: tuple[int, int] = (8, 64),
    batch_sizes: tuple[int, int] = (16, 128),
) -> TaskFamily:
    """Classification by MLPs with one hidden layer: random data set, width and batch size.

    Widths and batch sizes are drawn log-uniformly from their ranges (ends included). All tasks
    have arrays of the largest size, so that a meta-batch is one `vmap`: hidden units beyond the
    width are switched off (their gradients are zero), and examples beyond the batch size have
    weight 0. A batch is ``{"x": [..., b, ...], "y": [..., b], "weight": [..., b]}``.

    Args:
      sets: data sets of one input shape and one number of classes.
      widths: smallest and largest width of the hidden layer.
      batch_sizes: smallest and largest number of examples of a mini-batch.

    Raises:
      ValueError: the sets differ in shape, classes or scale, or a range is empty.
    """
    for name, (low, high) in (("widths", widths), ("batch_sizes", batch_sizes)):
        if not 1 <= low <= high:
            raise ValueError(f"mlp_family: {name} must be 1 <= low <= high, got {(low, high)}.")
    kinds = {(check(d).splits["train"]["x"].shape[1:], d.num_classes, d.scale) for d in sets}
    if len(kinds) != 1:
        raise ValueError(
            f"mlp_family: sets must agree in shape, classes and scale, got {sorted(kinds)}."
        )
    shape, outputs, scale = kinds.pop()
    stacked = {split: _stack([d.splits[split] for d in sets]) for split in sets[0].splits}
    net = MLP((widths[1], outputs))

    def sample_params(stacked: Stacked, key: Key) -> dict[str, jax.Array]:
        del stacked
        k_set, k_width, k_batch = jax.random.split(key, 3)
        return {
            "set": jax.random.randint(k_set, (), 0, len(sets)),
            "width": log_uniform(k_width, *widths),
            "batch_size": log_uniform(k_batch, *batch_sizes),
        }

    def task(stacked: Stacked, chosen: dict[str, jax.Array]) -> Task:
        active = jnp.arange(widths[1]) < chosen["width"]

        def init(key: Key) -> Params:
            params = net.init(key, jnp.zeros((1, *shape)))["params"]
            # PyTorch's range for the fan-in that is switched on.
            widen = jnp.sqrt(widths[1] / chosen["width"])
            return {**params, "Dense_1": jax.tree.map(lambda w: w * widen, params["Dense_1"])}

        def logits(params: Params, x: jax.Array) -> jax.Array:
            first, second = params["Dense_0"], params["Dense_1"]
            x = scale * x.reshape(len(x), -1).astype(jnp.float32)
            hidden = jnp.where(active, jax.nn.relu(x @ first["kernel"] + first["bias"]), 0.0)
            return hidden @ second["kernel"] + second["bias"]

        return _weighted_task(init, logits, stacked, chosen, batch_sizes[1])

    return TaskFamily(sample_params, task, data=stacked)


def log_uniform(key: Key, low: int, high: int) -> jax.Array:
    """An integer from `low` to `high`, both included, whose logarithm is about uniform."""
    ends = jnp.log(jnp.array([low, high + 1.0]))
    drawn = jnp.exp(jax.random.uniform(key, (), minval=ends[0], maxval=ends[1]))
    return jnp.clip(drawn.astype(jnp.int32), low, high)


def _weighted_task(
    init: Callable[..., Params],
    logits: Callable[..., jax.Array],
    stacked: Stacked,
    chosen: dict[str, jax.Array],
    largest_batch: int,
) -> Task:
    """The task on data set ``chosen["set"]`` with ``chosen["batch_size"]`` examples that count."""

    def loss(params, batch):
        losses = negative_log_likelihood(logits(params, batch["x"]), batch["y"])
        return _mean(batch["weight"], losses)

    def accuracy(params, batch):
        return _mean(batch["weight"], jnp.argmax(logits(params, batch["x"]), -1) == batch["y"])

    def sample(key: Key, shape: tuple[int, ...], split: Split) -> Batch:
        x, y, count = stacked[split]
        which, shape = chosen["set"], (*shape, largest_batch)
        index = jax.random.randint(key, shape, 0, count[which])
        weight = jnp.arange(largest_batch) < chosen["batch_size"]
        weight = jnp.broadcast_to(weight, shape).astype(jnp.float32)
        return {"x": x[which, index], "y": y[which, index], "weight": weight}

    def whole(split: Split) -> Batch:
        x, y, count = stacked[split]
        which = chosen["set"]
        weight = (jnp.arange(y.shape[1]) < count[which]).astype(jnp.float32)
        return {"x": x[which], "y": y[which], "weight": weight}

    return Task(init, loss, sample, whole, accuracy)


def _mean(weight, values):
    return jnp.sum(weight * values) / jnp.sum(weight)


def _stack(examples: Sequence[Batch]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One split of `Stacked`; the shorter data sets are padded with zeros."""
    counts = [len(e["y"]) for e in examples]

    def padded(array: np.ndarray) -> np.ndarray:
        missing = max(counts) - len(array)
        return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))

    x, y = (np.stack([padded(np.asarray(e[name])) for e in examples]) for name in ("x", "y"))
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(counts)
