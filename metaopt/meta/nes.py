"""Natural evolution strategies on theta; the only module that imports evosax."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from evosax.algorithms import Open_ES

from metaopt.base import LearnedOptimizer, TaskFamily, Theta
from metaopt.meta.base import MetaTrainer, check_theta, inner_run, starts


@dataclass(frozen=True, kw_only=True)
class NESConfig:
    """Settings of NES.

    Attributes:
      population: candidates per generation; even, since they come in antithetic pairs.
      tasks: tasks per generation, shared by the whole population.
      sigma: standard deviation of the noise on theta at generation 0.
      lr: learning rate of Adam on the estimated gradient at generation 0.
      half_life: generations after which sigma and lr are halved (smoothly); 0 keeps them.
      weight_decay: decoupled weight decay of the meta-parameters, times lr.
      min_steps, max_steps: an inner run takes K steps, drawn uniformly once per generation.
      objective: "final": the loss on held-out mini-batches after K steps; "trajectory": the mean
        training loss over the K steps.
      eval_batches: held-out mini-batches per evaluation of "final".
    """

    population: int = 32
    tasks: int = 4
    sigma: float = 0.05
    lr: float = 1e-2
    half_life: int = 500
    weight_decay: float = 0.0
    min_steps: int = 100
    max_steps: int = 100
    objective: Literal["final", "trajectory"] = "final"
    eval_batches: int = 4

    def __post_init__(self):
        if self.population < 2 or self.population % 2:
            raise ValueError(
                f"NESConfig.population must be even (antithetic pairs), got {self.population}."
            )
        for name in ("tasks", "min_steps", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"NESConfig.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("sigma", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"NESConfig.{name} must be positive, got {getattr(self, name)}.")
        if self.max_steps < self.min_steps:
            raise ValueError(
                f"NESConfig.max_steps ({self.max_steps}) must not be below "
                f"min_steps ({self.min_steps})."
            )
        if self.half_life < 0 or self.weight_decay < 0:
            raise ValueError(
                "NESConfig.half_life and weight_decay must not be negative, got "
                f"{self.half_life} and {self.weight_decay}."
            )


class NESState(NamedTuple):
    """Attributes: strategy: evosax state, mean ``[dims]``; generation: int32 []."""

    strategy: Any
    generation: jax.Array


def decayed(value: float, half_life: int) -> Callable[[Any], jax.Array]:
    """``value * 0.5^(generation / half_life)`` (L3RS, section 3.4; half_life 0: constant)."""
    if not half_life:
        return lambda generation: jnp.full_like(generation, value, dtype=jnp.float32)
    return lambda generation: value * 0.5 ** (jnp.asarray(generation, jnp.float32) / half_life)


def centered_ranks(losses: jax.Array) -> jax.Array:
    """``rank / (n - 1) - 1/2`` of losses ``[n]``, ties averaged; exactly 0 where all are equal.

    evosax's own ``rank * (1 / (n - 1)) - 0.5`` leaves 6e-8 there, which Adam scales up.
    """
    n = losses.shape[0]
    ranks = jax.scipy.stats.rankdata(losses) - 1.0
    return (2.0 * ranks - (n - 1)) / (2.0 * (n - 1))


def nes(lopt: LearnedOptimizer, family: TaskFamily, theta: Theta, config: NESConfig) -> MetaTrainer:
    r"""Antithetic NES with centered ranks and Adam, by evosax's `Open_ES`.

    .. math:: \hat g = \frac{1}{n \sigma} \sum_i w_i \epsilon_i, \qquad
       w = \mathrm{rank}(\text{loss}) / (n - 1) - 1/2

    with average ranks on ties (a constant loss moves nothing) and non-finite losses ranked worst.

    Args:
      lopt: what is trained.
      family: where its tasks come from.
      theta: an example of the meta-parameters; only its structure is used here.
      config: see `NESConfig`.

    References: Salimans et al. 2017; L3RS, section 3.4.
    """
    check_theta("nes", theta)
    sigma, lr = decayed(config.sigma, config.half_life), decayed(config.lr, config.half_life)
    strategy = Open_ES(
        population_size=config.population,
        solution=theta,
        optimizer=optax.chain(
            optax.snapshot("meta_grad_norm", optax.tree.norm),
            optax.adamw(lr, weight_decay=config.weight_decay),
        ),
        fitness_shaping_fn=lambda population, losses, state, params: centered_ranks(losses),
        # evosax 0.3.2 reads the schedule before it increments its counter: shifted by one here.
        std_schedule=lambda generation: sigma(generation + 1),
    )
    params = strategy.default_params

    def init(key, theta):
        state: Any = strategy.init(key, theta, params)
        return NESState(strong(state.replace(std=sigma(0))), jnp.zeros([], jnp.int32))

    def loss_of(theta, start, num_steps):
        final, trajectory = inner_run(
            lopt,
            family,
            theta,
            start,
            num_steps=num_steps,
            eval_batches=config.eval_batches,
        )
        return final if config.objective == "final" else trajectory

    def step(key, state: NESState):
        k_ask, k_tasks, k_steps, k_tell = jax.random.split(key, 4)
        num_steps = jax.random.randint(k_steps, (), config.min_steps, config.max_steps + 1)
        population, es = strategy.ask(k_ask, state.strategy, params)
        over_tasks = jax.vmap(loss_of, in_axes=(None, 0, None))
        losses = jax.vmap(over_tasks, in_axes=(0, None, None))(
            population, starts(family, jax.random.split(k_tasks, config.tasks)), num_steps
        )  # [population, tasks]
        losses = jnp.mean(losses, axis=1)
        finite = jnp.isfinite(losses)
        es, _ = strategy.tell(k_tell, population, jnp.where(finite, losses, jnp.inf), es, params)
        metrics = {
            "meta_loss": jnp.mean(losses, where=finite),
            "meta_loss_best": jnp.min(losses, initial=jnp.inf, where=finite),
            "meta_loss_std": jnp.std(losses, where=finite),
            "non_finite": jnp.sum(~finite),
            "grad_norm": optax.tree.get(es.opt_state, "meta_grad_norm"),
            "sigma": sigma(state.generation),
            "lr": lr(state.generation),
            "num_steps": num_steps,
            "inner_steps": num_steps * config.population * config.tasks,
        }
        return NESState(strong(es), state.generation + 1), metrics

    return MetaTrainer(init, step, lambda state: strategy.get_mean(state.strategy))


def strong(tree: Any) -> Any:
    """Arrays without weak types, which would make the second generation compile again."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.asarray(x).dtype), tree)
