"""What says which theta of a meta-training is kept: its loss on held-out runs."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from metaopt.core.checks import check_choice, check_integer
from metaopt.core.types import Key, LearnedOptimizer, TaskFamily, Theta
from metaopt.meta.base import as_groups, carried_bytes, held_out_loss, inner_run, loss_unit, starts
from metaopt.meta.population import evaluate_one


def validation(
    lopt: LearnedOptimizer,
    families: TaskFamily | Sequence[TaskFamily],
    num_steps: int,
    *,
    on: Literal["final", "trajectory"] = "final",
    runs: int = 8,
    eval_batches: int = 8,
    mesh: Mesh | None = None,
) -> Callable[[Theta, Key], Float[Array, ""]]:
    """``(theta, key) -> loss`` of runs of `num_steps` steps: `validate` of `training.train`.

    Of several families, losses are in units of the loss before the first step: those of one
    family must not decide alone which theta is kept.

    Args:
      lopt: what is meta-trained.
      families: where the runs' tasks come from; `key` should be one that meta-training never uses.
      num_steps: of each run.
      on: "final": the loss on held-out mini-batches after a run; "trajectory": the mean training
        loss along it, so that a fast start counts too.
      runs: from each family.
      eval_batches: mini-batches of the split "valid" on which the end of a run is judged.
      mesh: devices that share the runs; None: one device.

    Raises:
      ValueError: `on` is something else; `num_steps`, `runs` or `eval_batches` is below 1.
    """
    check_choice("validation: on", on, ("final", "trajectory"))
    for name, value in (("num_steps", num_steps), ("runs", runs), ("eval_batches", eval_batches)):
        check_integer(f"validation: {name}", value, 1)
    groups = as_groups(families)

    def group_loss(family, theta, key):
        def loss_of(start, theta):
            final, trajectory = inner_run(
                lopt, family, theta, start, num_steps=num_steps, eval_batches=eval_batches
            )
            loss = final if on == "final" else jnp.where(jnp.isnan(trajectory), jnp.inf, trajectory)
            if len(groups) == 1:
                return loss
            return loss / loss_unit(held_out_loss(family, start, start.params, eval_batches))

        begun = starts(family, jax.random.split(key, runs))
        held = carried_bytes(lopt, theta, jax.tree.map(lambda x: x[0], begun.params))
        return jnp.mean(evaluate_one(loss_of, begun, theta, mesh, held))

    def validate(theta, key):
        return jnp.mean(jnp.stack([group_loss(family, theta, key) for family in groups]))

    return validate
