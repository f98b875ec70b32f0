"""Fine-tuning of a pretrained network, wholly or in part; features of a frozen one."""

import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.types import Batch, Key, Split, Task
from metaopt.datasets import Dataset, check
from metaopt.tasks.classification import dataset_classifier, drawn
from metaopt.tasks.modules import TRAIN
from metaopt.tasks.partial import LoRA, Predicate, Statistics, partly_trained
from metaopt.tasks.scores import at_least_one


def finetune(
    net: nn.Module,
    pretrained: dict[str, Any],
    data: Dataset,
    *,
    trainable: Predicate | None = None,
    head: str | None = None,
    lora: LoRA | None = None,
    statistics: Statistics = "train",
    batch_size: int = 64,
) -> Task:
    """Classification of `data` by a pretrained network of which a part is trained.

    The params of the task are the trained leaves: those of a new read-out layer, those that
    `trainable` accepts, and adapters. Optimizers and guards see and copy these alone. The other
    leaves are arrays of the task, of which there is one copy.

    Args:
      net: a network that returns logits ``[n, num_classes]``; it may have two modes and a model
        state as in `metaopt.tasks.classification`.
      pretrained: the collections of the same network, ``{"params": ..., "batch_stats": ...}``.
      data: the data set.
      trainable: ``name -> bool``, which leaves of the params are trained, beside those of `head`;
        names as ``"Dense_0/kernel"``. None: no others.
      head: name of the read-out layer in the params, which starts anew for each run; the
        pretrained one may have any shape, or be missing. None: no layer starts anew.
      lora: adapters of chosen kernels.
      statistics: "train": the network trains in training mode, and its model state, such as the
        running statistics of BatchNorm, moves on. "frozen": it trains in evaluation mode, with the
        model state of `pretrained`.
      batch_size: examples of a mini-batch, drawn with replacement.

    Raises:
      ValueError: `pretrained` does not fit (the message names the first leaf that differs, and the
        shapes), nothing is trained, or an argument is out of range.

    Examples:
      >>> net = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)])
      >>> pretrained = net.init(jax.random.key(0), jnp.zeros((1, 2)))
      >>> task = finetune(net, pretrained, metaopt.datasets.moons(), head="layers_2")
      >>> list(task.init(jax.random.key(1)))
      ['layers_2']
    """
    check(data)
    at_least_one("finetune", batch_size=batch_size)
    part = partly_trained(
        "finetune",
        net,
        dataset_classifier("finetune", net, data),
        jax.ShapeDtypeStruct((1, *data.splits["train"]["x"].shape[1:]), jnp.float32),
        pretrained,
        trainable=trainable,
        head=head,
        lora=lora,
        statistics=statistics,
    )

    def sample(arrays: Any, key: Key, shape: tuple[int, ...], split: Split) -> Batch:
        batch = drawn(arrays["splits"][split], key, (*shape, batch_size))
        return part.with_keys(batch, key, shape)

    def init_model_state(arrays: Any, key: Key) -> Any:
        del key
        return arrays["model_state"]

    return Task(
        init=lambda arrays, key: part.init(arrays, key, arrays["splits"]["train"]["x"][:1]),
        loss=part.loss,
        sample=sample,
        whole=lambda arrays, split: arrays["splits"][split],
        accuracy=part.accuracy,
        init_model_state=init_model_state if part.keeps_state else None,
        eval_loss=part.eval_loss,
        data={**part.arrays, "splits": jax.tree.map(jnp.asarray, data.splits)},
    )


def cached(
    net: nn.Module, variables: dict[str, Any], data: Dataset, *, batch_size: int = 128
) -> Dataset:
    """The features that a frozen network makes of a data set, computed once.

    A task on them is the read-out layer alone, for example ``tasks.classification(nn.Dense(10),
    tasks.cached(...))``. This is `finetune` of a new head with frozen statistics, for a small part
    of its cost.

    Args:
      net: a network that returns features, such as a pretrained one without its read-out layer. It
        runs in evaluation mode.
      variables: its collections, ``{"params": ..., "batch_stats": ...}``; layers that `net` lacks
        are ignored.
      data: the data set, which `net` sees scaled.
      batch_size: examples that go through the network at once.

    Returns:
      The data set with the outputs of `net` as float32 inputs, and with scale 1.

    Raises:
      ValueError: `data` is no usable data set, or a feature is NaN or inf.
    """
    check(data)
    at_least_one("cached", batch_size=batch_size)
    mode: Any = {TRAIN: False} if TRAIN in inspect.signature(net.__call__).parameters else {}

    @jax.jit
    def features(variables: Any, x: jax.Array) -> jax.Array:
        outputs = net.apply(variables, x.astype(jnp.float32) * data.scale, **mode)
        return jnp.asarray(outputs, jnp.float32)

    splits: dict[Split, Batch] = {}
    for split, examples in data.splits.items():
        x = np.asarray(examples["x"])
        parts = []
        for start in range(0, len(x), batch_size):
            part = x[start : start + batch_size]
            missing = batch_size - len(part) if start else 0  # one program for all parts
            padded = np.pad(part, ((0, missing), *((0, 0) for _ in x.shape[1:])))
            parts.append(np.asarray(features(variables, padded))[: len(part)])
        splits[split] = {"x": jnp.asarray(np.concatenate(parts)), "y": jnp.asarray(examples["y"])}
    name = f"{data.name} as features of {type(net).__name__}"
    return check(Dataset(name=name, splits=splits, num_classes=data.num_classes))
