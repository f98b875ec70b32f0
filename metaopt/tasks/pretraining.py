"""Pretrained networks, from which fine-tuning tasks start; trained once and cached."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from metaopt._version import __version__
from metaopt.core.files import one_at_a_time, read_sealed, write_sealed
from metaopt.core.rollouts import unroll
from metaopt.core.types import Key, Params, Task
from metaopt.datasets import Dataset
from metaopt.tasks import classification

WINDOW = 50  # steps of one compiled program


class Recipe(NamedTuple):
    """How a network is trained: by Adam, with a cosine decay of the learning rate to zero.

    Attributes:
      num_steps: steps of training, a multiple of `WINDOW`.
      lr: initial learning rate.
      batch_size: examples of a mini-batch.
      seed: of the initial params and the mini-batches.
    """

    num_steps: int = 2000
    lr: float = 3e-3
    batch_size: int = 128
    seed: int = 0


DEFAULT = Recipe()


def pretrain(net: nn.Module, data: Dataset, recipe: Recipe = DEFAULT) -> Params:
    """Trains `net` on all classes of `data` and returns its params.

    Raises:
      ValueError: `recipe.num_steps` is no positive multiple of `WINDOW`, or `net` has a model
        state, which is not kept.
    """
    if recipe.num_steps < 1 or recipe.num_steps % WINDOW:
        raise ValueError(
            f"pretrain: num_steps must be a positive multiple of {WINDOW}, got {recipe.num_steps}."
        )
    task = classification(net, data, batch_size=recipe.batch_size)
    if task.init_model_state_fn is not None:
        raise ValueError(
            "pretrain: net has a model state, such as running statistics, which is not kept; use a "
            "network without one, for example a ResNet with norm='group'."
        )
    tx = optax.adam(optax.cosine_decay_schedule(recipe.lr, recipe.num_steps))
    k_init, k_batches = jax.random.split(jax.random.key(recipe.seed))
    params = task.init(k_init)
    state = tx.init(params)

    @jax.jit
    def window(task: Task, params: Params, state: Any, key: Key) -> tuple[Params, Any]:
        return unroll(tx, params, state, task.loss, task.sample(key, (WINDOW,)))[:2]

    for key in jax.random.split(k_batches, recipe.num_steps // WINDOW):
        params, state = window(task, params, state, key)
    return params


def pretrained(
    folder: Path, net: nn.Module, data: Dataset, recipe: Recipe = DEFAULT
) -> tuple[Params, float]:
    """`pretrain` with a cache on disk.

    The cache knows the network, the data and the recipe. Where several processes ask for the same
    network, one trains it and the others wait.

    Args:
      folder: the folder of the cache.
      net: the network.
      data: what it is trained on.
      recipe: how it is trained.

    Returns:
      params, and their accuracy on the "test" split of `data`.
    """
    file = folder / f"{_digest(net, data, recipe)}.cache"
    with one_at_a_time(file.with_suffix(".lock")):
        payload = read_sealed(file)
        if payload is None:  # missing or damaged
            flat = flatten_dict(jax.device_get(pretrain(net, data, recipe)), sep="/")
            payload = save_safetensors({k: np.asarray(v) for k, v in flat.items()})
            write_sealed(file, payload)
    flat = load_safetensors(payload)
    params = unflatten_dict({name: jnp.asarray(x) for name, x in flat.items()}, sep="/")
    task = classification(net, data, batch_size=recipe.batch_size)
    return params, float(_test_accuracy(task, params))


@jax.jit
def _test_accuracy(task: Task, params: Params) -> jax.Array:
    assert task.accuracy is not None
    return task.accuracy(params, task.whole("test"))


def _digest(net: nn.Module, data: Dataset, recipe: Recipe) -> str:
    """A digest of the network, the recipe and the training data."""
    content = hashlib.sha256()
    for name, array in sorted(data.splits["train"].items()):
        content.update(name.encode())
        content.update(np.asarray(array).tobytes())
    fields = [f.name for f in dataclasses.fields(net) if f.name not in ("parent", "name")]
    values = {name: getattr(net, name) for name in fields}
    settings = [
        __version__,
        type(net).__name__,
        {name: getattr(value, "__name__", repr(value)) for name, value in values.items()},
        recipe._asdict(),
        data.scale,
        data.num_classes,
        content.hexdigest(),
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
