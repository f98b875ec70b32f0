"""Inner runs cut into windows: their lengths, phases and starts."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_fields, check_integer
from metaopt.core.rollouts import init_state, mean_loss, train_loss
from metaopt.core.types import Key, LearnedOptimizer, TaskFamily, Theta
from metaopt.meta.base import Start, judging_batches, log_uniform, loss_unit

UNIT_BATCHES = 4  # mini-batches of the loss before the first step, where losses are normalised


@dataclass(frozen=True, kw_only=True)
class WindowsConfig:
    """Settings of inner runs of which a meta-update sees one window.

    Attributes:
      rollout: steps of the longest inner run; a new run starts after its last step.
      truncation: steps per window, that is per meta-update; lengths of runs are multiples of it.
      tasks: inner runs side by side per task group; their losses are averaged.
      lengths: "fixed": all runs take `rollout` steps. "log_uniform": each run draws its length from
        `min_rollout` to `rollout`. "curriculum": runs that begin at meta-update 0 take
        `min_rollout` steps, and the length grows geometrically to `rollout` at meta-update
        `curriculum`.
      min_rollout: steps of the shortest run where lengths are not fixed.
      curriculum: meta-updates over which runs grow.
      normalised: divide losses by the loss before the first step of the run, so that the tasks of
        a mixture have equal weight.
    """

    rollout: int = 100
    truncation: int = 20
    tasks: int = 1
    lengths: Literal["fixed", "log_uniform", "curriculum"] = "fixed"
    min_rollout: int = 20
    curriculum: int = 1000
    normalised: bool = False

    def __post_init__(self):
        check_fields(self)
        where = type(self).__name__
        for name in ("rollout", "truncation", "tasks", "min_rollout", "curriculum"):
            check_integer(f"{where}.{name}", getattr(self, name), 1)
        for name in ("rollout",) if self.lengths == "fixed" else ("rollout", "min_rollout"):
            if getattr(self, name) % self.truncation:
                raise ValueError(
                    f"{where}.{name} ({getattr(self, name)}) must be a multiple of "
                    f"truncation ({self.truncation})."
                )
        if self.lengths != "fixed" and self.min_rollout > self.rollout:
            raise ValueError(
                f"{where}.min_rollout ({self.min_rollout}) must not be above "
                f"rollout ({self.rollout})."
            )

    @property
    def horizon(self) -> tuple[int, int]:
        """Steps of the shortest and of the longest inner run."""
        shortest = self.rollout if self.lengths == "fixed" else self.min_rollout
        return shortest, self.rollout

    def windows(self, side_by_side: int) -> str:
        """What a meta-update does, in words, for so many runs side by side."""
        low, high = self.horizon
        lengths = f"{high}" if low == high else f"{low} to {high}"
        return f"windows of {self.truncation} steps of {side_by_side} runs of {lengths} steps"


class InnerRun(NamedTuple):
    """An inner run between two windows.

    Attributes:
      task_params: task params of its task.
      params: params of the optimizee.
      state: state of the optimizer, which holds the model state if there is one (`init_state`).
      unit: the unit of its losses.
    """

    task_params: Any
    params: Any
    state: Any
    unit: Float[Array, ""]


class Phase(NamedTuple):
    """The phase of an inner run.

    Attributes:
      length: int32 []; steps of the run.
      left: int32 []; windows until a new run starts.
    """

    length: Int[Array, ""]
    left: Int[Array, ""]


def new_phase(config: WindowsConfig, key: Key, update: Int[Array, ""]) -> Phase:
    """The phase of a run that begins at meta-update `update`; all arguments may be traced."""
    low, high = config.min_rollout // config.truncation, config.rollout // config.truncation
    if config.lengths == "fixed":
        windows = jnp.asarray(high)
    elif config.lengths == "log_uniform":
        windows = log_uniform(key, low, high)
    else:
        progress = jnp.minimum(update / config.curriculum, 1.0)
        windows = jnp.round(low * (high / low) ** progress)
    windows = jnp.clip(windows, min(low, high), high).astype(jnp.int32)
    return Phase(length=windows * config.truncation, left=windows)


def begin(
    lopt: LearnedOptimizer,
    family: TaskFamily,
    config: WindowsConfig,
    theta: Theta,
    start: Start,
    length: Int[Array, ""],
) -> InnerRun:
    """The run before its first window. Theta determines the optimizer's initial memory."""
    state = init_state(lopt.apply(theta, num_steps=length), start.params, start.model_state)
    unit = jnp.ones([])
    if config.normalised:
        task = family.task(start.task_params)
        loss_fn = lambda params, batch: train_loss(task.loss, params, start.model_state, batch)
        batches = judging_batches(task, start, UNIT_BATCHES, "train")
        unit = loss_unit(mean_loss(loss_fn, start.params, batches))
    return InnerRun(start.task_params, start.params, state, unit)
