"""Persistent evolution strategies: unbiased long horizons from windows of a few steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from metaopt.core.checks import check_number
from metaopt.core.rollouts import unroll_sampled
from metaopt.core.trees import all_finite, nbytes
from metaopt.core.types import LearnedOptimizer, TaskFamily, Theta
from metaopt.meta import devices
from metaopt.meta.base import MetaTrainer, as_groups, check_serves, check_theta, starts
from metaopt.meta.population import for_each
from metaopt.meta.strategies import persistent
from metaopt.meta.updates import MetaOptimizer, decayed, meta_optimizer, population_metrics
from metaopt.meta.windows import InnerRun, Phase, WindowsConfig, begin, new_phase


@dataclass(frozen=True, kw_only=True)
class PESConfig(WindowsConfig):
    """Settings of persistent evolution strategies; those of its windows are in `WindowsConfig`.

    Attributes:
      population: particles, in antithetic pairs; each pair is somewhere else in its own run.
      sigma: standard deviation of the noise on theta at generation 0.
      lr: learning rate on the estimated gradient at generation 0.
      optimizer: what the estimated gradient is given to: adam or sgd.
      half_life: generations after which sigma and lr are halved (smoothly); 0 keeps them.
      weight_decay: decoupled weight decay of the meta-parameters, times lr.
      clip: bound on the norm of the estimate; 0 leaves it as it is.
      clip_difference: bound on the difference of the two losses of a pair, so that a run that
        explodes does not outweigh all others; 0 leaves it as it is (and the estimate unbiased).
      persistent: False forgets the noise of earlier windows: truncated evolution strategies, of
        less variance, but blind to what happens after the window.
    """

    population: int = 32
    sigma: float = 0.05
    lr: float = 1e-2
    optimizer: MetaOptimizer = "adam"
    half_life: int = 500
    weight_decay: float = 0.0
    clip: float = 0.0
    clip_difference: float = 0.5
    persistent: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.population < 2 or self.population % 2:
            raise ValueError(
                f"PESConfig.population must be even (antithetic pairs), got {self.population}."
            )
        for name in ("sigma", "lr"):
            check_number(f"PESConfig.{name}", getattr(self, name), above=0)
        for name in ("half_life", "weight_decay", "clip", "clip_difference"):
            check_number(f"PESConfig.{name}", getattr(self, name), least=0)


class PESState(NamedTuple):
    """State between two windows.

    Attributes: strategy: evosax state, mean ``[dims]``, noise of all windows of a run so far
    ``[population, dims]``; runs: one `InnerRun` with leading axes [2, pairs, tasks] per task
    group; phase: `Phase` of each pair, [pairs]; generation: int32 [].
    """

    strategy: Any
    runs: tuple[InnerRun, ...]
    phase: Phase
    generation: Int[Array, ""]


def pes(
    lopt: LearnedOptimizer,
    families: TaskFamily | Sequence[TaskFamily],
    theta: Theta,
    config: PESConfig,
    mesh: Mesh | None = None,
) -> MetaTrainer:
    r"""Persistent evolution strategies, by evosax's `PersistentES`.

    .. math:: \hat g = \frac{1}{n} \sum_i L_i \sum_{\tau \le t} \epsilon_{i,\tau} / \sigma_\tau^2

    with L_i the mean training loss of particle i in its window t, and epsilon the noise on theta
    in its windows so far. For a fixed theta the mean over generations is the gradient of the mean
    training loss of whole runs (smoothed by sigma); without the inner sum only each window's own
    part of it is left. The first runs are cut short, each pair elsewhere, so that from then on
    all phases of a run are present in every generation. Only the difference of the losses of a
    pair counts; it is bounded by `config.clip_difference`.

    A non-finite loss counts as the worst finite one of the generation, and its pair starts
    afresh; a generation without a finite loss leaves theta.

    Args:
      lopt: what is trained.
      families: where its tasks come from; of several, each particle runs `config.tasks` of each.
      theta: an example of the meta-parameters; only its structure is used here.
      config: see `PESConfig`.
      mesh: devices that share the pairs evenly; the state of a pair's runs stays where it is.

    Raises: ValueError: theta is empty, not float32, or does not fit the tasks of every family;
      the pairs do not divide over the devices.

    References: Vicol, Metz, Sohl-Dickstein 2021 (arXiv 2112.13835).
    """
    if not isinstance(config, PESConfig):
        raise ValueError(f"pes: config must be a PESConfig, got a {type(config).__name__}.")
    check_theta("pes", theta)
    groups = as_groups(families)
    check_serves("pes", lopt, groups, theta)
    sigma, lr = decayed(config.sigma, config.half_life), decayed(config.lr, config.half_life)
    es = persistent(
        theta,
        population=config.population,
        sigma=sigma,
        optimizer=meta_optimizer(
            config.optimizer, lr, weight_decay=config.weight_decay, clip=config.clip
        ),
        accumulate=config.persistent,
        clip_difference=config.clip_difference,
    )
    pairs = config.population // 2
    devices.check_shares("pes: pairs (half of the population)", pairs, mesh)
    of_pairs, of_both = devices.runs_on_axis(0), devices.runs_on_axis(1)
    windows = [
        devices.over_runs(
            _windows(lopt, family, config),
            mesh,
            (of_both, of_pairs, of_both, of_pairs, of_pairs),
            of_both,
        )
        for family in groups
    ]

    # Per group a key for every start, [pairs, tasks]; both of a pair share theirs.
    start_keys = lambda key: jax.random.split(key, (len(groups), pairs, config.tasks))

    def init(key, theta):
        k_start, k_es = jax.random.split(key)
        length = jnp.asarray(config.rollout, jnp.int32)
        runs = []
        for family, keys in zip(groups, start_keys(k_start), strict=True):
            first = lambda s, family=family: begin(lopt, family, config, theta, s, length)
            run = jax.vmap(jax.vmap(first))(starts(family, keys))
            runs.append(jax.tree.map(lambda a: jnp.broadcast_to(a, (2, *a.shape)), run))
        ended = Phase(jnp.full(pairs, length), jnp.zeros(pairs, jnp.int32))
        return PESState(es.init(k_es, theta), tuple(runs), ended, jnp.zeros([], jnp.int32))

    def step(key, state: PESState):
        k_ask, k_start, k_length, k_tell = jax.random.split(key, 4)
        # Whole, or the devices would share these few numbers out, and gather them again.
        fresh = devices.gathered(state.phase.left == 0, mesh)
        new = _phases(config, jax.random.split(k_length, pairs), state.generation)
        phase = devices.gathered(optax.tree.where(fresh, new, state.phase), mesh)
        population, asked = es.ask(k_ask, state.strategy, state.generation)
        signed = jax.tree.map(lambda a: a.reshape(2, pairs, *a.shape[1:]), population)
        outcomes = [
            window(signed, keys, run, phase, fresh)
            for window, keys, run in zip(windows, start_keys(k_start), state.runs, strict=True)
        ]
        losses, good, runs = zip(*outcomes, strict=True)
        losses, good = devices.gathered((losses, good), mesh)
        losses = jnp.mean(jnp.concatenate(losses, axis=2), axis=2).ravel()  # [population]
        finite = jnp.isfinite(losses)
        told = es.tell(k_tell, population, losses, asked)
        alive = jnp.all(jnp.concatenate(good, axis=2), axis=(0, 2))
        phase = phase._replace(left=jnp.where(alive, phase.left - 1, 0))
        told = es.forget(told, jnp.tile(phase.left == 0, 2))
        metrics = {
            **population_metrics(losses, finite),
            **es.metrics(asked, told),
            "lr": lr(state.generation),
            "num_steps": jnp.mean(phase.length),
            "inner_steps": jnp.array(losses.size * config.tasks * len(groups) * config.truncation),
        }
        return PESState(told, runs, phase, state.generation + jnp.any(finite)), metrics

    def specs(state: PESState):
        return devices.specs_of(state)._replace(runs=devices.specs_of(state.runs, of_both))

    return MetaTrainer(init, step, lambda state: es.theta(state.strategy), specs)


def _phases(config: PESConfig, keys, generation) -> Phase:
    """Phases ``[pairs]`` of pairs that begin now; the very first ones end one after another."""
    phase = jax.vmap(new_phase, in_axes=(None, 0, None))(config, keys, generation)
    pairs = len(keys)
    cut = 1 + jnp.arange(pairs) * phase.left // pairs
    return phase._replace(left=jnp.where(generation == 0, cut, phase.left))


def _windows(lopt: LearnedOptimizer, family: TaskFamily, config: PESConfig):
    """One window of all particles of a task group.

    ``(thetas [2, pairs], keys [pairs, tasks], runs [2, pairs, tasks], phase, fresh [pairs]) ->
    losses, good, runs``, all [2, pairs, tasks]; `good` where nothing of the run is NaN or inf.
    """

    def window(theta, start, run: InnerRun, phase: Phase, fresh):
        run = optax.tree.where(fresh, begin(lopt, family, config, theta, start, phase.length), run)
        task = family.task(run.task_params)
        params, state, loss = unroll_sampled(
            lopt.apply(theta, num_steps=phase.length),
            run.params,
            run.state,
            task.loss,
            lambda t: task.sample(jax.random.fold_in(start.key, t), ()),
            config.truncation,
        )
        good = all_finite(params, state, loss)
        return loss / run.unit, good, run._replace(params=params, state=state)

    over_tasks = jax.vmap(window, in_axes=(None, 0, 0, None, None))
    of_pair = jax.vmap(over_tasks, in_axes=(0, None, 0, None, None))

    def of_all(thetas, keys, runs, phase, fresh):
        moved = lambda tree, *axes: jax.tree.map(lambda x: jnp.moveaxis(x, *axes), tree)
        pairs = moved(thetas, 0, 1), starts(family, keys), moved(runs, 0, 1), phase, fresh
        held = nbytes((runs.params, runs.state)) // phase.left.size
        return moved(for_each(lambda pair: of_pair(*pair), pairs, held), 1, 0)

    return of_all
