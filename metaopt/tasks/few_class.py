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
    head: str | None = None,
    classes: Sequence[int],
    ways: int,
    shots: int | None = None,
    batch_size: int = 64,
    held_out: int = 20,
    model_state: Any = None,
) -> TaskFamily:
    """Fine-tuning of a pretrained network to `ways` classes that it has not seen (L3RS section 4).

    A task is a random choice of `ways` of the `classes`, relabelled ``0 .. ways - 1``, and with
    `shots` of a few training examples of each. Its params are the pretrained ones, with a new
    read-out layer for these classes.

    For the head of a frozen network alone, give its features (`metaopt.tasks.cached`) as `data`,
    ``flax.linen.Dense(ways)`` as `net`, and None as `pretrained`. Meta-train on some `classes`, and
    test on others.

    Args:
      net: a network with `ways` outputs, which may have a model state and two modes as in
        `metaopt.tasks.classification`.
      data: all classes.
      pretrained: params of the same network (its read-out layer is not used); None: each run
        starts from random params.
      head: name of the read-out layer in the params; needed with `pretrained`.
      classes: labels of `data` to choose from.
      ways: classes of a task.
      shots: training examples per class of a task, drawn without replacement; None: all. Task
        params are then ``{"classes": [ways], "rows": [ways, shots]}``, and without it the classes
        ``[ways]`` alone.
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
    if pretrained is not None and head is None:
        raise ValueError("few_class: head is missing; name the read-out layer of `pretrained`.")
    if pretrained is not None and head not in pretrained:
        raise ValueError(f"few_class: head {head!r} is not in the params: {', '.join(pretrained)}.")
    rows = {split: _rows_by_class(data, split, classes) for split in data.splits}
    each = {split: min(held_out, fewest) for split, (_, _, fewest) in rows.items()}
    if shots is not None:
        at_least_one("few_class", shots=shots)
        if shots > (fewest := rows["train"][2]):
            raise ValueError(
                f"few_class: shots must be at most {fewest}, the training examples of the smallest "
                f"class, got {shots}."
            )
        each["train"] = shots
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

    def sample_task(arrays: Arrays, key: Key) -> Any:
        chosen = jax.random.choice(key, arrays["pool"], (ways,), replace=False)
        if shots is None:
            return chosen
        table, count = arrays["rows"]["train"]
        order = jax.random.uniform(jax.random.fold_in(key, 1), (ways, table.shape[1]))
        order = jnp.where(jnp.arange(table.shape[1]) < count[chosen, None], order, -1.0)
        _, places = jax.lax.top_k(order, shots)  # a random choice without replacement
        return {"classes": chosen, "rows": jnp.take_along_axis(table[chosen], places, axis=1)}

    def task(arrays: Arrays, task_params: Any) -> Task:
        chosen = task_params if shots is None else task_params["classes"]

        def init(key: Key) -> Params:
            params = functions.init(key, example(arrays))
            if arrays["pretrained"] is None:
                return params
            assert head is not None
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
            if shots is not None and split == "train":
                row = task_params["rows"][y, jax.random.randint(k_row, y.shape, 0, shots)]
            else:
                label = chosen[y]
                row = table[label, jax.random.randint(k_row, y.shape, 0, count[label])]
            batch = {"x": arrays["splits"][split]["x"][row], "y": y}
            return functions.with_keys(batch, key, shape)

        def whole(split: Split) -> Batch:
            if shots is not None and split == "train":
                row = task_params["rows"].reshape(-1)
            else:
                row = arrays["rows"][split][0][chosen, : each[split]].reshape(-1)
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
    return TaskFamily(sample_task, task, data=arrays)


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
