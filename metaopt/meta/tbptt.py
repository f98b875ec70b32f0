"""Truncated back-propagation through the inner run, Adam on theta after every window."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.base import LearnedOptimizer, TaskFamily, Theta
from metaopt.meta.base import MetaTrainer, check_theta, starts
from metaopt.rollouts import unroll
from metaopt.trees import all_finite


@dataclass(frozen=True, kw_only=True)
class TBPTTConfig:
    """Settings of truncated back-propagation.

    Attributes:
      rollout: steps of an inner run, after which it starts afresh; a multiple of `truncation`.
      truncation: steps per window, i.e. per meta-update.
      tasks: inner runs side by side, whose gradients are averaged.
      lr: learning rate of Adam on theta.
      clip: bound on the norm of the meta-gradient; 0 leaves it as it is.
      second_order: differentiate through the gradients that the optimizer sees.
    """

    rollout: int = 100
    truncation: int = 20
    tasks: int = 1
    lr: float = 1e-3
    clip: float = 0.0
    second_order: bool = False

    def __post_init__(self):
        for name in ("rollout", "truncation", "tasks"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"TBPTTConfig.{name} must be at least 1, got {getattr(self, name)}."
                )
        if self.rollout % self.truncation:
            raise ValueError(
                f"TBPTTConfig.rollout ({self.rollout}) must be a multiple of "
                f"truncation ({self.truncation})."
            )
        if not self.lr >= 0 or self.clip < 0:
            raise ValueError(
                f"TBPTTConfig.lr and clip must not be negative, got {self.lr} and {self.clip}."
            )


class InnerRun(NamedTuple):
    """An inner run between two windows.

    Attributes: task_params: of its task; params, state: of the optimizee; step: int32 [].
    """

    task_params: Any
    params: Any
    state: Any
    step: jax.Array


class TBPTTState(NamedTuple):
    """Attributes: theta; optimizer: Adam's state; runs: `InnerRun` with leading axis [tasks]."""

    theta: Theta
    optimizer: Any
    runs: InnerRun


def tbptt(lopt: LearnedOptimizer, family: TaskFamily, config: TBPTTConfig) -> MetaTrainer:
    """Truncated back-propagation through time.

    The loss of a window is the mean over its steps of the training losses (each on its own
    mini-batch), the one after its last update included. Params and optimizer state are carried
    to the next window as constants. A run that turned non-finite, or reached its end, starts
    afresh; a non-finite meta-gradient changes nothing.

    References: Andrychowicz et al. 2016 and their released code; LGL2O, section 4.
    """
    optimizer = optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
            optax.adam(config.lr),
        ),
        max_consecutive_errors=jnp.iinfo(jnp.int32).max,
    )

    def begin(start, theta):
        """Theta enters a run through the optimizer's initial memory."""
        state = lopt.apply(theta, num_steps=config.rollout).init(start.params)
        return InnerRun(start.task_params, start.params, state, step=jnp.zeros([], jnp.int32))

    def init(key, theta):
        check_theta("tbptt", theta)
        fresh = starts(family, jax.random.split(key, config.tasks))
        runs = jax.vmap(begin, in_axes=(0, None))(fresh, theta)
        return TBPTTState(theta, optimizer.init(theta), runs)

    def window_loss(theta, start, run):
        run = optax.tree.where(run.step == 0, begin(start, theta), run)
        task = family.task(run.task_params)
        batches = task.sample(start.key, (config.truncation + 1,))
        train, last = (
            jax.tree.map(lambda a: a[:-1], batches),
            jax.tree.map(lambda a: a[-1], batches),
        )
        params, state, losses = unroll(
            lopt.apply(theta, num_steps=config.rollout),
            run.params,
            run.state,
            task.loss,
            train,
            second_order=config.second_order,
        )
        final = task.loss(params, last)
        step = (run.step + config.truncation) % config.rollout
        step = jnp.where(all_finite(params, state, final), step, 0)
        loss = (jnp.sum(losses) + final) / (config.truncation + 1)
        return loss, InnerRun(run.task_params, params, state, step)

    def mean_window_loss(theta, fresh, runs):
        losses, runs = jax.vmap(window_loss, in_axes=(None, 0, 0))(theta, fresh, runs)
        return jnp.mean(losses), (losses, runs)

    def step(key, state: TBPTTState):
        fresh = starts(family, jax.random.split(key, config.tasks))
        grad, (losses, runs) = jax.grad(mean_window_loss, has_aux=True)(
            state.theta, fresh, state.runs
        )
        updates, opt_state = optimizer.update(grad, state.optimizer, state.theta)
        finite = jnp.isfinite(losses)
        metrics = {
            "meta_loss": jnp.mean(losses, where=finite),
            "non_finite": jnp.sum(~finite),
            "grad_norm": optax.tree.norm(grad),
            "inner_steps": jnp.array(config.truncation * config.tasks),
        }
        return TBPTTState(optax.apply_updates(state.theta, updates), opt_state, runs), metrics

    return MetaTrainer(init, step, lambda state: state.theta)
