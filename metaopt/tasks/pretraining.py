"""Networks trained on some classes, the start of fine-tuning tasks; made once and kept."""

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
from metaopt.core.files import one_at_a_time, write_whole
from metaopt.core.rollouts import unroll
from metaopt.core.types import Params
from metaopt.datasets import Dataset
from metaopt.tasks import classification

WINDOW = 50


class Recipe(NamedTuple):
    """How a network is trained: Adam, its rate on half a cosine down to zero.

    Attributes: num_steps; lr; batch_size; seed.
    """

    num_steps: int = 2000
    lr: float = 3e-3
    batch_size: int = 128
    seed: int = 0


DEFAULT = Recipe()


def pretrain(net: nn.Module, data: Dataset, recipe: Recipe = DEFAULT) -> Params:
    """Trains `net` on all classes of `data` and returns its params."""
    if recipe.num_steps < 1 or recipe.num_steps % WINDOW:
        raise ValueError(
            f"pretrain: num_steps must be a positive multiple of {WINDOW}, got {recipe.num_steps}."
        )
    task = classification(net, data, batch_size=recipe.batch_size)
    tx = optax.adam(optax.cosine_decay_schedule(recipe.lr, recipe.num_steps))
    k_init, k_batches = jax.random.split(jax.random.key(recipe.seed))
    params = task.init(k_init)
    state = tx.init(params)

    @jax.jit
    def window(params, state, key):
        return unroll(tx, params, state, task.loss, task.sample(key, (WINDOW,)))[:2]

    for key in jax.random.split(k_batches, recipe.num_steps // WINDOW):
        params, state = window(params, state, key)
    return params


def pretrained(
    folder: Path, net: nn.Module, data: Dataset, recipe: Recipe = DEFAULT
) -> tuple[Params, float]:
    """`pretrain`, or what it returned before for the same network, data and recipe.

    Of processes that want the same at once, one trains and the others wait for it.

    Args:
      folder: where results are kept.
      net, data, recipe: as in `pretrain`.

    Returns:
      params, and their accuracy on the "test" split of `data`.
    """
    file = folder / f"{_digest(net, data, recipe)}.safetensors"
    with one_at_a_time(file.with_suffix(".lock")):
        if not file.exists():
            flat = flatten_dict(jax.device_get(pretrain(net, data, recipe)), sep="/")
            write_whole(file, save_safetensors({k: np.asarray(v) for k, v in flat.items()}))
    flat = load_safetensors(file.read_bytes())
    params = unflatten_dict({name: jnp.asarray(x) for name, x in flat.items()}, sep="/")
    task = classification(net, data, batch_size=recipe.batch_size)
    assert task.accuracy is not None
    return params, float(jax.jit(task.accuracy)(params, task.whole("test")))


def _digest(net: nn.Module, data: Dataset, recipe: Recipe) -> str:
    """Changes with the network, the recipe, and what the training data hold."""
    content = hashlib.sha256()
    for name, array in sorted(data.splits["train"].items()):
        content.update(name.encode())
        content.update(np.asarray(array).tobytes())
    described = {
        field.name: getattr(value := getattr(net, field.name), "__name__", repr(value))
        for field in dataclasses.fields(net)
        if field.name not in ("parent", "name")
    }
    settings: list[Any] = [__version__, type(net).__name__, described, recipe._asdict()]
    settings += [data.scale, data.num_classes, content.hexdigest()]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
