"""Natural evolution strategies on theta: whole inner runs, one generation at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from metaopt.core.checks import check_fields, check_integer, check_known, check_number
from metaopt.core.types import LearnedOptimizer, TaskFamily, Theta
from metaopt.meta.base import (
    MetaTrainer,
    as_groups,
    carried_bytes,
    check_serves,
    check_theta,
    held_out_loss,
    inner_run,
    loss_unit,
    starts,
)
from metaopt.meta.devices import EVERYTHING_HERE, Spread
from metaopt.meta.population import evaluate
from metaopt.meta.strategies import GRADIENT, STRATEGIES, UNFIT, strategy
from metaopt.meta.updates import MetaOptimizer, decayed, meta_optimizer, population_metrics


@dataclass(frozen=True, kw_only=True)
class NESConfig:
    """Settings of NES.

    Attributes:
      strategy: how candidates are drawn and theta moves, by its name in evosax. Open_ES is NES
        with antithetic pairs; the others keep their own sampling. lr, optimizer and weight_decay
        act where a gradient is estimated (ARS, ASEBO, ESMC, GuidedES, Open_ES, PGPE).
      population: candidates per generation; even, since they come in antithetic pairs.
      tasks: tasks per generation and task group, shared by the whole population.
      sigma: standard deviation of the noise on theta at generation 0.
      lr: learning rate on the estimated gradient at generation 0.
      optimizer: what the estimated gradient is given to: adam or sgd.
      half_life: generations after which sigma and lr are halved (smoothly); 0 keeps them.
      weight_decay: decoupled weight decay of the meta-parameters, times lr.
      min_steps, max_steps: an inner run takes K steps, drawn uniformly once per generation.
      objective: "final": the loss on held-out mini-batches after K steps; "trajectory": the mean
        training loss over the K steps; "normalised": the final loss divided by the loss before
        the first step, so that the tasks of a mixture weigh alike.
      eval_batches: held-out mini-batches per evaluation of the final loss.
    """

    strategy: str = "Open_ES"
    population: int = 32
    tasks: int = 4
    sigma: float = 0.05
    lr: float = 1e-2
    optimizer: MetaOptimizer = "adam"
    half_life: int = 500
    weight_decay: float = 0.0
    min_steps: int = 100
    max_steps: int = 100
    objective: Literal["final", "trajectory", "normalised"] = "final"
    eval_batches: int = 4

    def __post_init__(self):
        check_fields(self)
        if self.strategy in UNFIT:
            raise ValueError(f"NESConfig.strategy {self.strategy}: {UNFIT[self.strategy]}.")
        check_known("NESConfig.strategy", self.strategy, STRATEGIES)
        if self.population < 2 or self.population % 2:
            raise ValueError(
                f"NESConfig.population must be even (antithetic pairs), got {self.population}."
            )
        if self.strategy == "ESMC" and self.population < 4:
            raise ValueError(
                f"NESConfig.population must be at least 4 for ESMC, got {self.population}."
            )
        for name in ("tasks", "min_steps", "eval_batches"):
            check_integer(f"NESConfig.{name}", getattr(self, name), 1)
        for name in ("sigma", "lr"):
            check_number(f"NESConfig.{name}", getattr(self, name), above=0)
        for name in ("half_life", "weight_decay"):
            check_number(f"NESConfig.{name}", getattr(self, name), least=0)
        if self.max_steps < self.min_steps:
            raise ValueError(
                f"NESConfig.max_steps ({self.max_steps}) must not be below "
                f"min_steps ({self.min_steps})."
            )


class NESState(NamedTuple):
    """Attributes: strategy: evosax state, mean ``[dims]``; generation: int32 []."""

    strategy: Any
    generation: Int[Array, ""]


def nes(
    lopt: LearnedOptimizer,
    families: TaskFamily | Sequence[TaskFamily],
    theta: Theta,
    config: NESConfig,
    spread: Spread = EVERYTHING_HERE,
) -> MetaTrainer:
    r"""Evolution strategies, by default antithetic NES with centered ranks and Adam (`Open_ES`).

    .. math:: \hat g = \frac{1}{n \sigma} \sum_i w_i \epsilon_i, \qquad
       w = \mathrm{rank}(\text{loss}) / (n - 1) - 1/2

    with average ranks on ties (a constant loss moves nothing) and non-finite losses ranked worst.
    A generation without a finite loss leaves theta and is not counted by the schedules.

    Args:
      lopt: what is trained.
      families: where its tasks come from; of several (networks or data sets of different
        structure) each generation takes `config.tasks` tasks each, group by group, and a
        candidate's loss is the mean over all of them.
      theta: an example of the meta-parameters; only its structure is used here.
      config: see `NESConfig`.
      spread: devices that share the population, and how many candidates each takes at a time.

    Raises: ValueError: theta is empty, not float32, or does not fit the tasks of every family.

    References: Salimans et al. 2017; L3RS, section 3.4.
    """
    if not isinstance(config, NESConfig):
        raise ValueError(f"nes: config must be a NESConfig, got a {type(config).__name__}.")
    check_theta("nes", theta)
    groups = as_groups(families)
    check_serves("nes", lopt, groups, theta)
    sigma, lr = decayed(config.sigma, config.half_life), decayed(config.lr, config.half_life)
    es = strategy(
        config.strategy,
        theta,
        population=config.population,
        sigma=sigma,
        optimizer=meta_optimizer(config.optimizer, lr, weight_decay=config.weight_decay),
    )
    group_losses = _group_losses(lopt, config, spread)

    def init(key, theta):
        return NESState(es.init(key, theta), jnp.zeros([], jnp.int32))

    def step(key, state: NESState):
        k_ask, k_tasks, k_steps, k_tell = jax.random.split(key, 4)
        num_steps = jax.random.randint(k_steps, (), config.min_steps, config.max_steps + 1)
        population, asked = es.ask(k_ask, state.strategy, state.generation)
        keys = jax.random.split(k_tasks, (len(groups), config.tasks))
        parts = [
            group_losses(f, population, k, num_steps) for f, k in zip(groups, keys, strict=True)
        ]
        losses = jnp.mean(jnp.concatenate(parts, axis=1), axis=1)
        finite = jnp.isfinite(losses)
        told = es.tell(k_tell, population, losses, asked)
        metrics = {
            **population_metrics(losses, finite),
            **es.metrics(asked, told),
            **({"lr": lr(state.generation)} if config.strategy in GRADIENT else {}),
            "num_steps": num_steps,
            "inner_steps": num_steps * config.population * config.tasks * len(groups),
        }
        return NESState(told, state.generation + jnp.any(finite)), metrics

    return MetaTrainer(init, step, lambda state: es.theta(state.strategy))


def _group_losses(lopt: LearnedOptimizer, config: NESConfig, spread: Spread):
    """``(family, population, keys [tasks], num_steps) -> losses [population, tasks]``."""

    def losses_of(family, population, keys, num_steps):
        group = starts(family, keys)

        def loss_of(theta, start, num_steps):
            final, trajectory = inner_run(
                lopt,
                family,
                theta,
                start,
                num_steps=num_steps,
                eval_batches=config.eval_batches,
            )
            return trajectory if config.objective == "trajectory" else final

        held = carried_bytes(lopt, *jax.tree.map(lambda x: x[0], (population, group.params)))
        losses = evaluate(loss_of, population, group, num_steps, spread, held)
        if config.objective != "normalised":
            return losses
        start_loss = lambda start: held_out_loss(family, start, start.params, config.eval_batches)
        return losses / loss_unit(jax.vmap(start_loss)(group))

    return losses_of
