"""What all meta-training methods share: one contract, and the loss of one inner run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaopt.core.rollouts import mean_loss, unroll_sampled
from metaopt.core.trees import nbytes
from metaopt.core.types import Key, LearnedOptimizer, Params, Split, Task, TaskFamily, Theta
from metaopt.meta.devices import specs_of
from metaopt.tasks.checking import check_family


class MetaTrainer(NamedTuple):
    """A meta-training method; all functions are pure and `step` is worth one `jax.jit`.

    Attributes:
      init: ``(key, theta) -> state``; a pytree of arrays.
      step: ``(key, state) -> (state, metrics)``; metrics are scalars, among them ``meta_loss``
        and ``inner_steps`` (optimizee steps taken).
      theta: ``state -> theta``, the meta-parameters learned so far.
      specs: ``state -> PartitionSpecs`` of its leaves: where they lie on a mesh of devices.
    """

    init: Callable[[Key, Theta], Any]
    step: Callable[[Key, Any], tuple[Any, dict[str, jax.Array]]]
    theta: Callable[[Any], Theta]
    specs: Callable[[Any], Any] = specs_of


class Start(NamedTuple):
    """The beginning of an inner run, whatever optimizer takes it on.

    Attributes: task_params: of its task; params: initial ones; key: for its mini-batches.
    """

    task_params: Any
    params: Any
    key: Key


def as_groups(families: TaskFamily | Sequence[TaskFamily]) -> tuple[TaskFamily, ...]:
    """One family or several (a mixture of structures), as the groups of a meta-batch."""
    return (families,) if isinstance(families, Task | TaskFamily) else tuple(families)


def check_serves(
    name: str, lopt: LearnedOptimizer, groups: Sequence[TaskFamily], theta: Theta
) -> None:
    """Raises `ValueError` unless `theta` fits the tasks of every group; computes nothing."""
    if not groups:
        raise ValueError(f"{name}: families is empty; give at least one TaskFamily.")
    for index, family in enumerate(groups):
        if not isinstance(family, TaskFamily):
            raise ValueError(
                f"{name}: families[{index}] must be a TaskFamily, got a {type(family).__name__}; "
                "of a Task metaopt.single(task) makes one."
            )

    def begin(family):
        k_task, k_init = jax.random.split(jax.random.key(0))
        params = family.task(family.sample(k_task)).init(k_init)
        return lopt.apply(theta, num_steps=1).init(params)

    for index, family in enumerate(groups):
        check_family(f"{name}: families[{index}]", family)
        try:
            jax.eval_shape(lambda family=family: begin(family))
        except ValueError as error:
            place = f"task group {index + 1} of {len(groups)}"
            raise ValueError(
                f"{name}: one theta must serve every task group, but not {place}: {error}"
            ) from None


def starts(family: TaskFamily, keys: Key) -> Start:
    """One `Start` per key, of whatever shape `keys` is: task, initial params, all mini-batches.

    By `lax.map`, since random bits under `vmap` take XLA several times longer to compile.
    """

    def start(key):
        k_task, k_init, key = jax.random.split(key, 3)
        task_params = family.sample(k_task)
        return Start(task_params, family.task(task_params).init(k_init), key)

    found = jax.lax.map(start, keys.ravel())
    return jax.tree.map(lambda a: a.reshape(*keys.shape, *a.shape[1:]), found)


def inner_run(
    lopt: LearnedOptimizer,
    family: TaskFamily,
    theta: Theta,
    start: Start,
    *,
    num_steps: Int[Array, ""] | int,
    eval_batches: int,
    split: Split = "valid",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """One run of the optimizer on a task of `family`, forward only.

    Runs from one start with different theta are compared on common random numbers.

    Returns:
      The loss after `num_steps` steps over `eval_batches` mini-batches of `split`, and the mean
      training loss along the way. NaN counts as +inf in the first.
    """
    k_train, _ = jax.random.split(start.key)
    task, tx = family.task(start.task_params), lopt.apply(theta, num_steps=num_steps)
    params, _, trajectory = unroll_sampled(
        tx,
        start.params,
        tx.init(start.params),
        task.loss,
        lambda t: task.sample(jax.random.fold_in(k_train, t), ()),
        num_steps,
    )
    return held_out_loss(family, start, params, eval_batches, split), trajectory


def carried_bytes(lopt: LearnedOptimizer, theta: Theta, params: Params) -> int:
    """What an inner run from such params carries from step to step."""
    begin = lambda theta, params: (params, lopt.apply(theta, num_steps=1).init(params))
    return nbytes(jax.eval_shape(begin, theta, params))


def held_out_loss(
    family: TaskFamily, start: Start, params: Params, eval_batches: int, split: Split = "valid"
) -> Float[Array, ""]:
    """Mean loss of `params` on the mini-batches that every run from `start` is judged on."""
    _, k_eval = jax.random.split(start.key)
    task = family.task(start.task_params)
    return mean_loss(task.loss, params, task.sample(k_eval, (eval_batches,), split))


def loss_unit(start_loss: Float[Array, "..."]) -> Float[Array, "..."]:
    """What losses are divided by, so that the tasks of a mixture weigh alike.

    That is the size of the loss before the first step; where it is no measure, 1e-8 stands for 0
    and 1 for what is not finite. Made for losses above 0 (of others the sign is kept).
    """
    unit = jnp.maximum(jnp.abs(start_loss), 1e-8)
    return jnp.where(jnp.isfinite(unit), unit, 1.0)


def check_theta(name: str, theta: Theta) -> None:
    """Raises `ValueError` if there is nothing that could be meta-trained."""
    leaves = jax.tree.leaves(theta)
    if not leaves:
        raise ValueError(f"{name}: theta is empty; hand-crafted optimizers have nothing to train.")
    for leaf in leaves:
        if jnp.asarray(leaf).dtype != jnp.float32:
            raise ValueError(
                f"{name}: theta must be float32 throughout, got {jnp.asarray(leaf).dtype}."
            )
