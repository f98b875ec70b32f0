"""Fine-tuning of a pretrained network to a few new classes."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.types import Batch, Key, Params, Split, Task, TaskFamily
from metaopt.datasets import Dataset, check, check_classes
from metaopt.tasks.classification import dataset_classifier
from metaopt.tasks.scores import at_least_one

Arrays: TypeAlias = dict[str, Any]


def few_class(
    net: nn.Module,
    data: Dataset,
    pretrained: Params | None,
    *,
    head: str,
    classes: Sequence[int],
    ways: int,
    batch_size: int = 64,
    held_out: int = 20,
    model_state: Any = None,
) -> TaskFamily:
    """Fine-tuning of a pretrained network to `ways` classes that it has not seen (L3RS section 4).

    A task is a random choice of `ways` of the `classes`, relabelled ``0 .. ways - 1``. Its params
    are the pretrained ones, with a new read-out layer for these classes.

    Args:
      net: a network with `ways` outputs, which may have a model state and two modes as in
        `metaopt.tasks.classification`.
      data: all classes.
      pretrained: params of the same network (its read-out layer is not used); None: each run
        starts from random params.
      head: name of the read-out layer in the params.
      classes: labels of `data` to choose from.
      ways: classes of a task.
      batch_size: examples of a mini-batch; all classes are equally likely.
      held_out: examples per class of a whole split, or as many as every class has.
      model_state: the model state of `pretrained`, ``{collection: tree}``, for example
        ``{"batch_stats": ...}``; for a network that has one.

    Raises:
      ValueError: a class is missing, `head` is not in `pretrained`, a number is out of range, or
        `model_state` is missing, or given for a network without one.
    """
    check(data)
    check_classes("few_class", classes, data.num_classes)
    at_least_one("few_class", ways=ways, batch_size=batch_size, held_out=held_out)
    if ways > len(classes):
        raise ValueError(f"few_class: ways must be at most {len(classes)} classes, got {ways}.")
    if pretrained is not None and head not in pretrained:
        raise ValueError(f"few_class: head {head!r} is not in the params: {', '.join(pretrained)}.")
    rows = {split: _rows_by_class(data, split, classes) for split in data.splits}
    each = {split: min(held_out, fewest) for split, (_, _, fewest) in rows.items()}
    functions = dataset_classifier("few_class", net, data)
    stateful = functions.init_model_state is not None
    if (model_state is not None) != (stateful and pretrained is not None):
        given = "is given" if model_state is not None else "is missing"
        raise ValueError(
            f"few_class: model_state {given}; give it with `pretrained`, for a network that keeps "
            "running statistics beside its params, and only then."
        )

    def example(arrays: Arrays) -> jax.Array:
        return arrays["splits"]["train"]["x"][:1]

    def sample_classes(arrays: Arrays, key: Key) -> jax.Array:
        return jax.random.choice(key, arrays["pool"], (ways,), replace=False)

    def task(arrays: Arrays, chosen: jax.Array) -> Task:
        def init(key: Key) -> Params:
            params = functions.init(key, example(arrays))
            if arrays["pretrained"] is None:
                return params
            return {**arrays["pretrained"], head: params[head]}

        def init_model_state(key: Key) -> Any:
            if arrays["pretrained"] is not None:
                return arrays["model_state"]
            assert functions.init_model_state is not None
            return functions.init_model_state(key, example(arrays))

        def sample(key: Key, shape: tuple[int, ...], split: Split) -> Batch:
            table, count = arrays["rows"][split]
            k_label, k_row = jax.random.split(key)
            y = jax.random.randint(k_label, (*shape, batch_size), 0, ways)
            label = chosen[y]
            row = table[label, jax.random.randint(k_row, y.shape, 0, count[label])]
            batch = {"x": arrays["splits"][split]["x"][row], "y": y}
            return functions.with_keys(batch, key, shape)

        def whole(split: Split) -> Batch:
            table, _ = arrays["rows"][split]
            row = table[chosen, : each[split]].reshape(-1)
            y = jnp.repeat(jnp.arange(ways), each[split])
            return {"x": arrays["splits"][split]["x"][row], "y": y}

        return Task(
            init=init,
            loss=functions.loss,
            sample=sample,
            whole=whole,
            accuracy=functions.accuracy,
            init_model_state=init_model_state if stateful else None,
            eval_loss=functions.eval_loss,
        )

    arrays = {
        "splits": jax.tree.map(jnp.asarray, data.splits),
        "rows": {split: (table, count) for split, (table, count, _) in rows.items()},
        "pool": jnp.asarray(classes),
        "pretrained": pretrained,
        "model_state": model_state,
    }
    return TaskFamily(sample_classes, task, data=arrays)


def _rows_by_class(
    data: Dataset, split: Split, classes: Sequence[int]
) -> tuple[jax.Array, jax.Array, int]:
    """Where the examples of each class are.

    Returns:
      Rows of each class ``[num_classes, most]``, the shorter ones padded; how many there are
      ``[num_classes]``; and the fewest of one of `classes`.
    """
    labels = np.asarray(data.splits[split]["y"])
    rows = [np.flatnonzero(labels == c) for c in range(data.num_classes)]
    counts = np.array([len(r) for r in rows])
    missing = [c for c in classes if not counts[c]]
    if missing:
        raise ValueError(
            f"few_class: data set {data.name!r}, split {split!r}: no example of the classes "
            f"{missing}; leave them out or use a larger data set."
        )
    table = np.zeros((data.num_classes, counts.max()), np.int32)
    for c, row in enumerate(rows):
        table[c, : len(row)] = row
    return jnp.asarray(table), jnp.asarray(counts), int(counts[list(classes)].min())
