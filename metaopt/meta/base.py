"""What all meta-training methods share: one contract, and the loss of one inner run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metaopt.base import Key, LearnedOptimizer, Split, TaskFamily, Theta
from metaopt.rollouts import mean_loss, unroll_sampled


class MetaTrainer(NamedTuple):
    """A meta-training method; all functions are pure and `step` is worth one `jax.jit`.

    Attributes:
      init: ``(key, theta) -> state``; a pytree of arrays.
      step: ``(key, state) -> (state, metrics)``; metrics are scalars, among them ``meta_loss``
        and ``inner_steps`` (optimizee steps taken).
      theta: ``state -> theta``, the meta-parameters learned so far.
    """

    init: Callable[[Key, Theta], Any]
    step: Callable[[Key, Any], tuple[Any, dict[str, jax.Array]]]
    theta: Callable[[Any], Theta]


class Start(NamedTuple):
    """The beginning of an inner run, whatever optimizer takes it on.

    Attributes: task_params: of its task; params: initial ones; key: for its mini-batches.
    """

    task_params: Any
    params: Any
    key: Key


def starts(family: TaskFamily, keys: Key) -> Start:
    """One `Start` per key, stacked along axis 0: task, initial params and all mini-batches.

    By `lax.map`, since random bits under `vmap` take XLA several times longer to compile.
    """

    def start(key):
        k_task, k_init, key = jax.random.split(key, 3)
        task_params = family.sample(k_task)
        return Start(task_params, family.task(task_params).init(k_init), key)

    return jax.lax.map(start, keys)


def inner_run(
    lopt: LearnedOptimizer,
    family: TaskFamily,
    theta: Theta,
    start: Start,
    *,
    num_steps: jax.Array | int,
    eval_batches: int,
    split: Split = "valid",
) -> tuple[jax.Array, jax.Array]:
    """One run of the optimizer on a task of `family`, forward only.

    Runs from one start with different theta are compared on common random numbers.

    Returns:
      The loss after `num_steps` steps over `eval_batches` mini-batches of `split`, and the mean
      training loss along the way. NaN counts as +inf in the first.
    """
    k_train, k_eval = jax.random.split(start.key)
    task, tx = family.task(start.task_params), lopt.apply(theta, num_steps=num_steps)
    params, _, trajectory = unroll_sampled(
        tx,
        start.params,
        tx.init(start.params),
        task.loss,
        lambda t: task.sample(jax.random.fold_in(k_train, t), ()),
        num_steps,
    )
    return mean_loss(task.loss, params, task.sample(k_eval, (eval_batches,), split)), trajectory


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
