"""What all meta-training methods share: the contract, and the loss of one inner run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaopt.core.rollouts import held_model_state, init_state, mean_loss, unroll_sampled
from metaopt.core.trees import nbytes
from metaopt.core.types import (
    Batch,
    Families,
    Key,
    Keys,
    LearnedOptimizer,
    Params,
    Split,
    Task,
    TaskFamily,
    Theta,
    functions_with_data,
    loss_arguments,
    single,
    with_data,
)
from metaopt.meta.devices import specs_of
from metaopt.tasks.checking import check_family

QUARTERS = 4  # measurements of a run that is judged at any time


@functions_with_data("init_fn", "step_fn", "theta_fn", "specs_fn")
class MetaTrainer:
    """A meta-training method with the tasks that it trains on; all functions are pure.

    A meta-trainer is a pytree: its leaves are the arrays of its task families, its functions are
    static. A compiled meta-update takes it as an argument::

        update = jax.jit(meta.MetaTrainer.step)
        state, metrics = update(trainer, key, state)

    ``jax.jit(trainer.step)`` works as well, and compiles the arrays into the program.

    Attributes:
      data: the task families, or None.
    """

    def __init__(
        self,
        init: Callable[..., Any],
        step: Callable[..., tuple[Any, dict[str, jax.Array]]],
        theta: Callable[[Any], Theta],
        specs: Callable[[Any], Any] = specs_of,
        *,
        data: Any = None,
    ):
        """Makes a meta-trainer of its functions.

        With `data`, `init` and `step` take it as an additional first argument.

        Args:
          init: ``(key, theta) -> state``; a pytree of arrays.
          step: ``(key, state) -> (state, metrics)``, one meta-update. Metrics are scalars, among
            them ``meta_loss`` and ``inner_steps`` (optimizee steps taken).
          theta: ``state -> theta``, the meta-parameters learned so far.
          specs: ``state -> PartitionSpecs`` of its leaves on a mesh of devices.
          data: the task families.
        """
        self.init_fn = init
        self.step_fn = step
        self.theta_fn = theta
        self.specs_fn = specs
        self.data = data

    def init(self, key: Key, theta: Theta) -> Any:
        """The state before the first meta-update."""
        return with_data(self.init_fn, self.data)(key, theta)

    def step(self, key: Key, state: Any) -> tuple[Any, dict[str, jax.Array]]:
        """One meta-update: the next state, and metrics."""
        return with_data(self.step_fn, self.data)(key, state)

    def theta(self, state: Any) -> Theta:
        """The meta-parameters learned so far."""
        return self.theta_fn(state)

    def specs(self, state: Any) -> Any:
        """`PartitionSpec` of each leaf of the state on a mesh of devices."""
        return self.specs_fn(state)


class Start(NamedTuple):
    """The beginning of an inner run, the same for all optimizers.

    Attributes:
      task_params: of its task.
      params: initial params.
      model_state: initial model state, or None.
      key: for its mini-batches.
    """

    task_params: Any
    params: Any
    model_state: Any
    key: Key


def as_groups(name: str, families: Families) -> tuple[TaskFamily, ...]:
    """One family or several (a mixture of structures), as the groups of a meta-batch.

    Raises:
      ValueError: there is no family, or one is neither a `TaskFamily` nor a `Task`.
    """
    groups = (families,) if isinstance(families, Task | TaskFamily) else tuple(families)
    if not groups:
        raise ValueError(f"{name}: families is empty; give at least one TaskFamily or Task.")
    for index, family in enumerate(groups):
        if not isinstance(family, Task | TaskFamily):
            raise ValueError(
                f"{name}: families[{index}] must be a TaskFamily or a Task, got a "
                f"{type(family).__name__}."
            )
    return tuple(single(group) if isinstance(group, Task) else group for group in groups)


def checked_groups(name: str, families: Families) -> tuple[TaskFamily, ...]:
    """`as_groups`, which also traces the functions of every family.

    Raises:
      ValueError: as in `as_groups`, or a function of a family fails.
    """
    groups = as_groups(name, families)
    for index, family in enumerate(groups):
        check_family(f"{name}: families[{index}]", family)
    return groups


def check_theta(
    name: str, lopt: LearnedOptimizer, groups: Sequence[TaskFamily], theta: Theta
) -> None:
    """Raises `ValueError` unless `theta` can be trained and fits all tasks; computes nothing."""
    leaves = jax.tree.leaves(theta)
    if not leaves:
        raise ValueError(f"{name}: theta is empty; hand-crafted optimizers have nothing to train.")
    for leaf in leaves:
        if jnp.asarray(leaf).dtype != jnp.float32:
            raise ValueError(
                f"{name}: theta must be float32 throughout, got {jnp.asarray(leaf).dtype}."
            )

    def first_state(family: TaskFamily, theta: Theta) -> Any:
        k_task, k_init = jax.random.split(jax.random.key(0))
        params = family.task(family.sample(k_task)).init(k_init)
        return lopt.apply(theta, num_steps=1).init(params)

    for index, family in enumerate(groups):
        try:
            jax.eval_shape(first_state, family, theta)
        except ValueError as error:
            place = f"task group {index + 1} of {len(groups)}"
            raise ValueError(
                f"{name}: one theta must serve every task group, but not {place}: {error}"
            ) from None


def starts(family: TaskFamily, keys: Keys) -> Start:
    """One `Start` per key, with leading axes of the shape of `keys`.

    Uses `lax.map`: random bits under `vmap` take XLA several times longer to compile.
    """

    def start(key: Key) -> Start:
        k_task, k_init, key = jax.random.split(key, 3)
        task_params = family.sample(k_task)
        task = family.task(task_params)
        return Start(task_params, task.init(k_init), task.init_model_state(k_init), key)

    flat = jax.lax.map(start, keys.ravel())
    return jax.tree.map(lambda a: a.reshape(*keys.shape, *a.shape[1:]), flat)


def inner_run(
    lopt: LearnedOptimizer,
    family: TaskFamily,
    theta: Theta,
    start: Start,
    *,
    num_steps: Int[Array, ""] | int,
    eval_batches: int,
    split: Split = "valid",
    measurements: int = 1,
) -> tuple[Float[Array, " M"], Float[Array, ""]]:
    """One run of the optimizer on a task of `family`, forward only.

    Runs from one start with different theta share all random numbers.

    Args:
      lopt: the optimizer.
      family: the family of the task.
      theta: meta-parameters.
      start: the beginning of the run.
      num_steps: steps of the run.
      eval_batches: held-out mini-batches of a measurement.
      split: where they are drawn.
      measurements: the number M of held-out losses, which are measured at even distances; the last
        one after the last step.

    Returns:
      The M losses over `eval_batches` mini-batches of `split`, and the mean training loss along the
      way. NaN counts as +inf in the losses.
    """
    k_train, _ = jax.random.split(start.key)
    task, tx = family.task(start.task_params), lopt.apply(theta, num_steps=num_steps)

    def part(carry, index):
        params, state, total = carry
        first, last = (num_steps * i // measurements for i in (index, index + 1))
        params, state, mean = unroll_sampled(
            tx,
            params,
            state,
            task.loss,
            lambda t: task.sample(jax.random.fold_in(k_train, first + t), ()),
            last - first,
        )
        loss = held_out_loss(
            family, start, params, eval_batches, split, model_state=held_model_state(state)
        )
        return (params, state, total + mean * (last - first)), loss

    carry = (start.params, init_state(tx, start.params, start.model_state), jnp.zeros([]))
    (_, _, total), losses = jax.lax.scan(part, carry, jnp.arange(measurements))
    return losses, total / num_steps


def carried_bytes(lopt: LearnedOptimizer, theta: Theta, start: Start) -> int:
    """Bytes that an inner run from `start` carries from step to step."""

    def first_carry(theta: Theta, start: Start) -> Any:
        tx = lopt.apply(theta, num_steps=1)
        return start.params, init_state(tx, start.params, start.model_state)

    return nbytes(jax.eval_shape(first_carry, theta, start))


def held_out_loss(
    family: TaskFamily,
    start: Start,
    params: Params,
    eval_batches: int,
    split: Split = "valid",
    *,
    model_state: Any = None,
) -> Float[Array, ""]:
    """Mean loss of `params` on the mini-batches that every run from `start` is judged on.

    Args:
      family: the family of the task.
      start: the beginning of the run.
      params: what is judged, in evaluation mode.
      eval_batches: number of mini-batches.
      split: where they are drawn.
      model_state: the model state that belongs to `params`, or None.
    """
    task = family.task(start.task_params)
    loss_fn = lambda arguments, batch: task.eval_loss(*arguments, batch)
    batches = judging_batches(task, start, eval_batches, split)
    return mean_loss(loss_fn, loss_arguments(params, model_state), batches)


def judging_batches(task: Task, start: Start, number: int, split: Split) -> Batch:
    """The mini-batches ``[number, ...]`` that every run from `start` is judged on."""
    _, k_eval = jax.random.split(start.key)
    return task.sample(k_eval, (number,), split)


def log_uniform(
    key: Key, low: Int[Array, ""] | int, high: Int[Array, ""] | int
) -> Float[Array, ""]:
    """A whole number, uniform in its logarithm, from `low` to `high`, up to rounding."""
    ends = jnp.log(jnp.array([low, high + 1.0]))
    return jnp.floor(jnp.exp(jax.random.uniform(key, (), minval=ends[0], maxval=ends[1])))


def loss_unit(start_loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """The unit of losses, so that the tasks of a mixture have equal weight.

    It is the magnitude of the loss before the first step, at least 1e-8, and 1 where that loss is
    not finite. Made for losses above 0; the sign of others is kept.
    """
    unit = jnp.maximum(jnp.abs(start_loss), 1e-8)
    return jnp.where(jnp.isfinite(unit), unit, 1.0)
