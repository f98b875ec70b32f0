"""Checks of a user's task: tracing it shows whether its functions keep the contract of `Task`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metaopt.core.named import describe
from metaopt.core.rollouts import checked_loss, scalar, train_loss
from metaopt.core.trees import cast_like, check_float_tree
from metaopt.core.types import Split, Task, TaskFamily, loss_arguments

AXES = (2, 3)  # leading axes that `sample` is asked for


def check_family(where: str, family: TaskFamily, splits: Sequence[Split] = ()) -> None:
    """Raises `ValueError` for the first function of a task that fails; computes nothing.

    Args:
      where: how the message calls the task.
      family: the family whose functions are traced.
      splits: splits to sample besides the default one.

    Raises:
      ValueError: a function raises, or returns something that `Task` does not allow. The message
        names the function, and the line of the user's file where it raised.
    """
    stage = "sample of the family"

    def trace(family: TaskFamily) -> None:
        nonlocal stage
        task_params = family.sample(jax.random.key(0))
        stage = "task of the family"
        task = family.task(task_params)
        _check_functions(task)
        stage = "init"
        params = task.init(jax.random.key(0))
        if not jax.tree.leaves(params):
            raise ValueError("there are no params to optimize")
        check_float_tree("params", params)
        stage = "init_model_state"
        model_state = task.init_model_state(jax.random.key(0))
        if model_state is None and task.init_model_state_fn is not None:
            raise ValueError("must return a pytree of arrays, got None")
        model_state = cast_like(model_state, model_state)  # fails unless all leaves are arrays
        arguments = loss_arguments(params, model_state)
        for split in (None, *splits):
            stage = "sample(key, shape)" if split is None else f"sample(key, shape, {split!r})"
            batch = _check_sample(task, split)
            stage = "loss"
            value_fn = lambda *arguments, batch=batch: task.loss(*arguments, batch)
            checked_loss(stage, value_fn, model_state)(params, model_state)
            stage = "eval_loss"
            scalar(task.eval_loss)(*arguments, batch)
            stage = "accuracy"
            if task.accuracy is not None:
                jnp.asarray(task.accuracy(*arguments, batch))

    try:
        jax.eval_shape(trace, family)
    except Exception as error:  # whatever the user's functions raise
        raise ValueError(f"{where}: {stage}: {describe(error)}") from error


def check_start(where: str, family: TaskFamily) -> None:
    """Raises `ValueError` unless the loss before the first step is finite; computes it."""
    k_task, k_init, k_batch = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def first_loss(family: TaskFamily) -> jax.Array:
        task = family.task(family.sample(k_task))
        params, model_state = task.init(k_init), task.init_model_state(k_init)
        return train_loss(task.loss, params, model_state, task.sample(k_batch, ()))

    loss = first_loss(family)
    if not jnp.isfinite(loss):
        raise ValueError(
            f"{where}: its loss before the first step is {loss}; nothing can be learned from that."
        )


def _check_functions(task: Any) -> None:
    if not isinstance(task, Task):
        raise ValueError(f"must be a metaopt.Task, got a {type(task).__name__}")
    for name in ("init", "loss", "sample", "whole"):
        function = getattr(task, f"{name}_fn")
        if not callable(function):
            raise ValueError(f"{name} must be a function, got {function!r}")
    for name in ("accuracy", "init_model_state", "eval_loss"):
        function = getattr(task, f"{name}_fn")
        if function is not None and not callable(function):
            raise ValueError(f"{name} must be a function or None, got {function!r}")


def _check_sample(task: Task, split: Split | None) -> Any:
    """One mini-batch of `task`, after a check of the leading axes."""
    given = () if split is None else (split,)
    one = task.sample(jax.random.key(0), (), *given)
    several = task.sample(jax.random.key(0), AXES, *given)
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(batch)] for batch in (one, several)]
    if [AXES + shape for shape in shapes[0]] != shapes[1]:
        raise ValueError(
            f"batches must have the leading axes asked for, got arrays of {shapes[0]} for shape () "
            f"and of {shapes[1]} for shape {AXES}"
        )
    return one
