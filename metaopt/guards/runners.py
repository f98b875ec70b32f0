"""Runners: optimizers that step side by side on the same mini-batches, each at its own point."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.core.rollouts import step_with_model_state
from metaopt.core.trees import all_finite
from metaopt.core.types import Params
from metaopt.guards.core import Losses


class Runner(NamedTuple):
    """One optimizer on its way.

    Attributes:
      params: its point.
      state: state of its transformation.
      model_state: model state that belongs to `params`, or None.
    """

    params: Params
    state: Any
    model_state: Any


def start(tx: optax.GradientTransformation, params: Params, model_state: Any) -> Runner:
    """Returns a runner at a copy of `params`, so that the caller may donate its own."""
    copy = lambda tree: jax.tree.map(jnp.array, tree)
    return Runner(copy(params), tx.init(params), copy(model_state))


def advance(
    tx: optax.GradientTransformationExtraArgs, runner: Runner, losses: Losses
) -> tuple[Runner, jax.Array]:
    """Takes one step.

    Args:
      tx: the transformation. It receives optax's extra args `value`, `grad` and `value_fn`.
      runner: the runner before the step.
      losses: of the mini-batch.

    Returns:
      The runner after the step, and the loss before it.
    """
    params, state, model_state, (loss, _) = step_with_model_state(
        tx, runner.params, runner.state, runner.model_state, losses.train
    )
    return Runner(params, state, model_state), loss


def advance_if_finite(
    tx: optax.GradientTransformationExtraArgs, runner: Runner, losses: Losses
) -> tuple[Runner, jax.Array, jax.Array]:
    """Does as `advance`, but stays where the step would lead to NaN or inf.

    Returns:
      The runner after the step, the loss before it, and whether the step was taken.
    """
    new_runner, loss = advance(tx, runner, losses)
    taken = all_finite(new_runner.params, new_runner.model_state)
    return optax.tree.where(taken, new_runner, runner), loss, taken
