"""Natural evolution strategies on theta: whole inner runs, one generation at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_fields, check_integer, check_known, check_number
from metaopt.core.types import Families, Key, Keys, LearnedOptimizer, TaskFamily, Theta
from metaopt.meta.base import (
    QUARTERS,
    MetaTrainer,
    Start,
    carried_bytes,
    check_theta,
    checked_groups,
    held_out_loss,
    inner_run,
    log_uniform,
    loss_unit,
    starts,
)
from metaopt.meta.devices import EVERYTHING_HERE, Spread, mesh_for
from metaopt.meta.population import evaluate
from metaopt.meta.strategies import GRADIENT, STRATEGIES, UNFIT, Strategy, strategy
from metaopt.meta.updates import MetaOptimizer, decayed, meta_optimizer, population_metrics


@dataclass(frozen=True, kw_only=True)
class NESConfig:
    """NES: evolution strategies on whole inner runs.

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
      min_steps: the smallest number K of steps of an inner run.
      max_steps: the largest one.
      lengths: how a generation draws its K between the two: "uniform" or "log_uniform".
      objective: "final": the loss on held-out mini-batches after K steps; "trajectory": the mean
        training loss over the K steps; "normalised": the final loss divided by the loss before
        the first step, so that the tasks of a mixture weigh alike; "anytime": the mean logarithm of
        the held-out losses after each quarter of the K steps, so that progress on the way counts,
        and tasks weigh alike (losses must be positive: a run whose loss has no logarithm counts
        as not finite).
      eval_batches: held-out mini-batches per evaluation of the final loss.
    """

    name: ClassVar[str] = "nes"
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
    lengths: Literal["uniform", "log_uniform"] = "uniform"
    objective: Literal["final", "trajectory", "normalised", "anytime"] = "final"
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

    @property
    def horizon(self) -> tuple[int, int]:
        """Steps of the shortest and of the longest inner run."""
        return self.min_steps, self.max_steps

    def work(self, groups: int) -> str:
        """What a generation does, in words, for tasks of `groups` groups."""
        low, high = self.horizon
        lengths = f"{high}" if low == high else f"{low} to {high}"
        return f"{self.population} candidates x {self.tasks * groups} runs of {lengths} steps"

    def mesh(self) -> Mesh | None:
        """The devices that share a generation; their shares need not be even."""
        return mesh_for(self.population, self.tasks) if jax.device_count() > 1 else None

    def trainer(
        self,
        lopt: LearnedOptimizer,
        families: Families,
        spread: Spread = EVERYTHING_HERE,
    ) -> MetaTrainer:
        """See `nes`."""
        return nes(lopt, families, self, spread)


class NESState(NamedTuple):
    """State between two generations.

    Attributes:
      theta: the mean of the search distribution.
      strategy: evosax's state, with the same mean as a vector ``[dims]``.
      generation: int32 []; generations with a finite loss so far.
    """

    theta: Theta
    strategy: Any
    generation: Int[Array, ""]


def nes(
    lopt: LearnedOptimizer,
    families: Families,
    config: NESConfig,
    spread: Spread = EVERYTHING_HERE,
) -> MetaTrainer:
    r"""Evolution strategies, by default antithetic NES with centered ranks and Adam (`Open_ES`).

    .. math:: \hat g = \frac{1}{n \sigma} \sum_i w_i \epsilon_i, \qquad
       w = \mathrm{rank}(\text{loss}) / (n - 1) - 1/2

    with average ranks for ties (a constant loss does not move theta) and non-finite losses ranked
    worst. A generation without a finite loss leaves theta, and the schedules do not count it.

    Args:
      lopt: the optimizer to train.
      families: a family of tasks, a task, or several of them. With several (networks or data sets
        of different structure) a generation takes `config.tasks` tasks of each, and a candidate's
        loss is the mean over all.
      config: see `NESConfig`.
      spread: the devices that share the population, and how many candidates each takes at a time.

    Returns:
      The meta-trainer; its `init` takes the initial theta.

    Raises:
      ValueError: a family is not usable. At `init`: theta is empty, not float32, or does not fit
        the tasks of every family.

    References:
      Salimans et al. 2017; L3RS, section 3.4.
    """
    if not isinstance(config, NESConfig):
        raise ValueError(f"nes: config must be a NESConfig, got a {type(config).__name__}.")
    groups = checked_groups("nes", families)
    sigma, lr = decayed(config.sigma, config.half_life), decayed(config.lr, config.half_life)

    def strategy_of(theta: Theta) -> Strategy:
        return strategy(
            config.strategy,
            theta,
            population=config.population,
            sigma=sigma,
            optimizer=meta_optimizer(config.optimizer, lr, weight_decay=config.weight_decay),
        )

    def init(groups: Sequence[TaskFamily], key: Key, theta: Theta) -> NESState:
        check_theta("nes", lopt, groups, theta)
        es = strategy_of(theta).init(key, theta)
        return NESState(theta, es, jnp.zeros([], jnp.int32))

    def step(groups: Sequence[TaskFamily], key: Key, state: NESState):
        es = strategy_of(state.theta)
        k_ask, k_tasks, k_steps, k_tell = jax.random.split(key, 4)
        num_steps = draw_steps(config, k_steps)
        population, asked = es.ask(k_ask, state.strategy, state.generation)
        keys = jax.random.split(k_tasks, (len(groups), config.tasks))
        group_losses = [
            _losses(lopt, config, spread, family, population, group_keys, num_steps)
            for family, group_keys in zip(groups, keys, strict=True)
        ]
        losses = jnp.mean(jnp.concatenate(group_losses, axis=1), axis=1)
        finite = jnp.isfinite(losses)
        after = es.tell(k_tell, population, losses, asked)
        metrics = {
            **population_metrics(losses, finite),
            **es.metrics(asked, after),
            **({"lr": lr(state.generation)} if config.strategy in GRADIENT else {}),
            "num_steps": num_steps,
            "inner_steps": num_steps * config.population * config.tasks * len(groups),
        }
        return NESState(es.theta(after), after, state.generation + jnp.any(finite)), metrics

    return MetaTrainer(init, step, lambda state: state.theta, data=groups)


def draw_steps(config: NESConfig, key: Key) -> Int[Array, ""]:
    """The number of steps of a generation's inner runs."""
    low, high = config.min_steps, config.max_steps
    if config.lengths == "uniform":
        return jax.random.randint(key, (), low, high + 1)
    return jnp.clip(log_uniform(key, low, high), low, high).astype(jnp.int32)


def _losses(
    lopt: LearnedOptimizer,
    config: NESConfig,
    spread: Spread,
    family: TaskFamily,
    population: Theta,
    keys: Keys,
    num_steps: Int[Array, ""],
) -> Float[Array, "population tasks"]:
    """Losses of all candidates on the tasks of one family, one task per key."""
    group = starts(family, keys)

    def loss_of(theta: Theta, start: Start, shared: Any) -> jax.Array:
        family, num_steps = shared
        losses, trajectory = inner_run(
            lopt,
            family,
            theta,
            start,
            num_steps=num_steps,
            eval_batches=config.eval_batches,
            measurements=QUARTERS if config.objective == "anytime" else 1,
        )
        if config.objective == "anytime":
            return jnp.mean(jnp.log(losses))
        return trajectory if config.objective == "trajectory" else losses[-1]

    first = jax.tree.map(lambda x: x[0], (population, group))
    losses = evaluate(
        loss_of, population, group, (family, num_steps), spread, carried_bytes(lopt, *first)
    )
    if config.objective != "normalised":
        return losses

    def start_loss(start: Start) -> jax.Array:
        return held_out_loss(
            family, start, start.params, config.eval_batches, model_state=start.model_state
        )

    return losses / loss_unit(jax.vmap(start_loss)(group))
