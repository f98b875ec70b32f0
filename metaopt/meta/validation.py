"""The loss on held-out runs, which decides which theta of a meta-training is kept."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float

from metaopt.core.checks import check_choice, check_integer
from metaopt.core.types import Families, Key, LearnedOptimizer, TaskFamily, Theta
from metaopt.meta.base import (
    QUARTERS,
    Start,
    as_groups,
    carried_bytes,
    held_out_loss,
    inner_run,
    loss_unit,
    starts,
)
from metaopt.meta.population import evaluate_one


def lengths_between(shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths of runs that stand for all between two: these, and their geometric mean."""
    middle = round(math.sqrt(shortest * longest))
    return tuple(dict.fromkeys((shortest, middle, longest)))


def validation(
    lopt: LearnedOptimizer,
    families: Families,
    num_steps: int | Sequence[int],
    *,
    on: Literal["final", "trajectory", "anytime"] = "final",
    each: bool = False,
    runs: int = 8,
    eval_batches: int = 8,
    mesh: Mesh | None = None,
) -> Callable[[Theta, Key], Float[Array, "..."]]:
    """A function ``(theta, key) -> loss`` of runs of `num_steps` steps, for `meta.loop.train`.

    With several families, losses are in units of the loss before the first step, so that one
    family does not decide alone which theta is kept.

    Args:
      lopt: the optimizer to judge.
      families: the tasks of the runs, as for `nes`. `key` should be one that meta-training never
        uses.
      num_steps: steps of each run; or several lengths, for the mean over them.
      on: "final": the loss on held-out mini-batches after a run. "trajectory": the mean training
        loss along it, so that a fast start counts too. "anytime": the mean logarithm of the
        held-out losses after each quarter of it, for tasks with few training data, on which a
        training loss says little. Logarithms need no units.
      runs: runs of each family.
      eval_batches: mini-batches of the split "valid" that measure the final loss.
      mesh: the devices that share the runs; None: one device.

    Returns:
      The function, as a pytree whose leaves are the arrays of `families` (`jax.tree_util.Partial`),
      so that compiled programs take it as an argument.

    Raises:
      ValueError: `on` is unknown; `num_steps`, `runs` or `eval_batches` is below 1; `families`
        is empty or holds something else.
    """
    check_choice("validation: on", on, ("final", "trajectory", "anytime"))
    lengths = [num_steps] if isinstance(num_steps, int) else list(num_steps)
    for value in lengths or [0]:
        check_integer("validation: num_steps", value, 1)
    for name, value in (("runs", runs), ("eval_batches", eval_batches)):
        check_integer(f"validation: {name}", value, 1)
    groups = as_groups("validation", families)

    def loss_of(start: Start, shared: tuple[TaskFamily, Theta, jax.Array | int]) -> jax.Array:
        family, theta, num_steps = shared
        losses, trajectory = inner_run(
            lopt,
            family,
            theta,
            start,
            num_steps=num_steps,
            eval_batches=eval_batches,
            measurements=QUARTERS if on == "anytime" else 1,
        )
        if on == "anytime":
            loss = jnp.mean(jnp.log(losses))
            return jnp.where(jnp.isnan(loss), jnp.inf, loss)
        loss = (
            losses[-1] if on == "final" else jnp.where(jnp.isnan(trajectory), jnp.inf, trajectory)
        )
        if len(groups) == 1:
            return loss
        first = held_out_loss(
            family, start, start.params, eval_batches, model_state=start.model_state
        )
        return loss / loss_unit(first)

    def group_loss(family: TaskFamily, theta: Theta, key: Key) -> Float[Array, " H"]:
        group = starts(family, jax.random.split(key, runs))
        state_bytes = carried_bytes(lopt, theta, jax.tree.map(lambda x: x[0], group))

        def mean_loss(num_steps: jax.Array | int) -> jax.Array:
            shared = (family, theta, num_steps)
            return jnp.mean(evaluate_one(loss_of, group, shared, mesh, state_bytes))

        if len(lengths) == 1:
            return mean_loss(lengths[0])[None]
        return jax.lax.map(mean_loss, jnp.array(lengths))  # one program for all of them

    def validate(groups: Sequence[TaskFamily], theta: Theta, key: Key) -> Float[Array, "..."]:
        losses = jnp.concatenate([group_loss(family, theta, key) for family in groups])
        return losses if each else jnp.mean(losses)

    return Partial(validate, groups)
