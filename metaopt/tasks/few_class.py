"""Fine-tuning of a pretrained network to a few new classes."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.types import Batch, Params, Split, Task, TaskFamily
from metaopt.datasets import Dataset, check, check_classes
from metaopt.tasks.classification import classifier
from metaopt.tasks.scores import at_least_one


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
) -> TaskFamily:
    """Fine-tuning of a pretrained network to `ways` classes that it has not seen (L3RS section 4).

    A task is a random choice of `ways` of the `classes`, relabelled ``0 .. ways - 1``; its params
    are the pretrained ones, with a fresh read-out layer for the new classes.

    Args:
      net: a network with `ways` outputs.
      data: all classes.
      pretrained: params of the same network (its read-out layer is not used); None: each run
        starts from random ones.
      head: name of the read-out layer in the params.
      classes: labels of `data` to choose from.
      ways: classes of a task.
      batch_size: examples of a mini-batch, classes drawn alike.
      held_out: examples per class of a whole "valid" or "test" split, as far as there are.
    """
    check(data)
    check_classes("few_class", classes, data.num_classes)
    at_least_one("few_class", ways=ways, batch_size=batch_size, held_out=held_out)
    if ways > len(classes):
        raise ValueError(f"few_class: ways must be at most {len(classes)} classes, got {ways}.")
    if pretrained is not None and head not in pretrained:
        raise ValueError(f"few_class: head {head!r} is not in the params: {', '.join(pretrained)}.")
    rows = {split: _rows_by_class(data, split, classes) for split in data.splits}
    fresh, loss, accuracy = classifier(net, data)

    def task(chosen) -> Task:
        def init(key):
            params = fresh(key)
            return params if pretrained is None else {**pretrained, head: params[head]}

        def sample(key, shape, split: Split = "train") -> Batch:
            table, count = rows[split]
            k_label, k_row = jax.random.split(key)
            y = jax.random.randint(k_label, (*shape, batch_size), 0, ways)
            label = chosen[y]
            row = table[label, jax.random.randint(k_row, y.shape, 0, count[label])]
            return {"x": data.splits[split]["x"][row], "y": y}

        def whole(split: Split = "test") -> Batch:
            table, count = rows[split]
            each = min(held_out, int(np.asarray(count)[list(classes)].min()))
            row = table[chosen, :each].reshape(-1)
            y = jnp.repeat(jnp.arange(ways), each)
            return {"x": data.splits[split]["x"][row], "y": y}

        return Task(init, loss, sample, whole, accuracy)

    pool = jnp.asarray(classes)
    return TaskFamily(lambda key: jax.random.choice(key, pool, (ways,), replace=False), task)


def _rows_by_class(
    data: Dataset, split: Split, classes: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Rows of each class ``[num_classes, most]``, the shorter ones padded, and how many ``[C]``."""
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
    for c, found in enumerate(rows):
        table[c, : len(found)] = found
    return jnp.asarray(table), jnp.asarray(counts)
