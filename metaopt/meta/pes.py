"""Persistent evolution strategies: unbiased long horizons from windows of a few steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from metaopt.core import cpu
from metaopt.core.checks import check_number
from metaopt.core.rollouts import unroll_sampled
from metaopt.core.trees import all_finite, nbytes
from metaopt.core.types import Families, Key, Keys, LearnedOptimizer, TaskFamily, Theta
from metaopt.meta import devices
from metaopt.meta.base import MetaTrainer, Start, check_theta, checked_groups, starts
from metaopt.meta.devices import EVERYTHING_HERE, Spread
from metaopt.meta.sharing import even_mesh
from metaopt.meta.strategies import Persistent, persistent
from metaopt.meta.updates import MetaOptimizer, decayed, meta_optimizer, population_metrics
from metaopt.meta.windows import InnerRun, Phase, WindowsConfig, begin, new_phase


@dataclass(frozen=True, kw_only=True)
class PESConfig(WindowsConfig):
    """PES: evolution strategies on windows of longer inner runs, without bias.

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

    name: ClassVar[str] = "pes"
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

    def work(self, groups: int) -> str:
        """What a meta-update does, in words, for tasks of `groups` groups."""
        return self.windows(self.population * self.tasks * groups)

    def mesh(self) -> Mesh | None:
        """The devices that share the antithetic pairs evenly; None for a single device."""
        return even_mesh("PESConfig.population", self.population, unit=2)

    def trainer(
        self,
        lopt: LearnedOptimizer,
        families: Families,
        spread: Spread = EVERYTHING_HERE,
    ) -> MetaTrainer:
        """See `pes`."""
        return pes(lopt, families, self, spread)


class PESState(NamedTuple):
    """State between two windows.

    Attributes:
      theta: the mean of the search distribution.
      strategy: evosax's state: the same mean as a vector ``[dims]``, and the accumulated noise of
        each particle in its run so far ``[population, dims]``.
      runs: one `InnerRun` per task group, with leading axes [2, pairs, tasks].
      phase: `Phase` of each pair, [pairs].
      generation: int32 []; generations with a finite loss so far.
    """

    theta: Theta
    strategy: Any
    runs: tuple[InnerRun, ...]
    phase: Phase
    generation: Int[Array, ""]


def pes(
    lopt: LearnedOptimizer,
    families: Families,
    config: PESConfig,
    spread: Spread = EVERYTHING_HERE,
) -> MetaTrainer:
    r"""Persistent evolution strategies, by evosax's `PersistentES`.

    .. math:: \hat g = \frac{1}{n} \sum_i L_i \sum_{\tau \le t} \epsilon_{i,\tau} / \sigma_\tau^2

    where :math:`L_i` is the mean training loss of particle i in its window t, and
    :math:`\epsilon` is the noise on theta in its windows so far. For a fixed theta the mean over
    generations is the gradient of the mean training loss of whole runs (smoothed by sigma). Without
    the inner sum, only the part of each single window remains. The first runs are cut to different
    lengths, so that every later generation contains all phases of a run. Only the difference of
    the losses of a pair counts; `config.clip_difference` bounds it.

    A non-finite loss counts as the worst finite one of the generation, and its pair starts a new
    run. A generation without a finite loss leaves theta.

    Args:
      lopt: the optimizer to train.
      families: a family of tasks, a task, or several of them. With several, each particle runs
        `config.tasks` of each.
      config: see `PESConfig`.
      spread: the devices that share the pairs evenly, and how many pairs each takes at a time. The
        state of a pair's runs stays on its device.

    Returns:
      The meta-trainer; its `init` takes the initial theta.

    Raises:
      ValueError: a family is not usable, or the devices cannot share the pairs evenly. At `init`:
        theta is empty, not float32, or does not fit the tasks of every family.

    References:
      Vicol, Metz, Sohl-Dickstein 2021 (arXiv 2112.13835).
    """
    if not isinstance(config, PESConfig):
        raise ValueError(f"pes: config must be a PESConfig, got a {type(config).__name__}.")
    groups, mesh = checked_groups("pes", families), spread.mesh
    sigma, lr = decayed(config.sigma, config.half_life), decayed(config.lr, config.half_life)
    pairs = config.population // 2
    devices.check_shares("pes: pairs (half of the population)", pairs, mesh)
    whole, of_pairs, of_both = devices.WHOLE, devices.runs_on_axis(0), devices.runs_on_axis(1)
    window = devices.over_runs(
        partial(_window, lopt, config, spread.chunk),
        mesh,
        (whole, of_both, of_pairs, of_both, of_pairs, of_pairs),
        of_both,
    )

    def strategy_of(theta: Theta) -> Persistent:
        return persistent(
            theta,
            population=config.population,
            sigma=sigma,
            optimizer=meta_optimizer(
                config.optimizer, lr, weight_decay=config.weight_decay, clip=config.clip
            ),
            accumulate=config.persistent,
            clip_difference=config.clip_difference,
        )

    def start_keys(key: Key) -> Keys:
        """A key for every start, [groups, pairs, tasks]; both particles of a pair share theirs."""
        return jax.random.split(key, (len(groups), pairs, config.tasks))

    def init(groups: Sequence[TaskFamily], key: Key, theta: Theta) -> PESState:
        check_theta("pes", lopt, groups, theta)
        k_start, k_es = jax.random.split(key)
        length = jnp.asarray(config.rollout, jnp.int32)
        runs = []
        for family, keys in zip(groups, start_keys(k_start), strict=True):
            first = partial(begin, lopt, family, config, theta, length=length)
            run = jax.vmap(jax.vmap(first))(starts(family, keys))
            runs.append(jax.tree.map(lambda a: jnp.broadcast_to(a, (2, *a.shape)), run))
        return PESState(
            theta=theta,
            strategy=strategy_of(theta).init(k_es, theta),
            runs=tuple(runs),
            phase=Phase(length=jnp.full(pairs, length), left=jnp.zeros(pairs, jnp.int32)),
            generation=jnp.zeros([], jnp.int32),
        )

    def step(groups: Sequence[TaskFamily], key: Key, state: PESState):
        es = strategy_of(state.theta)
        k_ask, k_start, k_length, k_tell = jax.random.split(key, 4)
        # Keep these few numbers whole: XLA would distribute them, and gather them again.
        fresh = devices.gathered(state.phase.left == 0, mesh)
        new = _phases(config, jax.random.split(k_length, pairs), state.generation)
        phase = devices.gathered(optax.tree.where(fresh, new, state.phase), mesh)
        population, asked = es.ask(k_ask, state.strategy, state.generation)
        signed = jax.tree.map(lambda a: a.reshape(2, pairs, *a.shape[1:]), population)
        outcomes = [
            window(family, signed, keys, run, phase, fresh)
            for family, keys, run in zip(groups, start_keys(k_start), state.runs, strict=True)
        ]
        losses, good, runs = zip(*outcomes, strict=True)
        losses, good = devices.gathered((losses, good), mesh)
        losses = jnp.mean(jnp.concatenate(losses, axis=2), axis=2).ravel()  # [population]
        finite = jnp.isfinite(losses)
        after = es.tell(k_tell, population, losses, asked)
        alive = jnp.all(jnp.concatenate(good, axis=2), axis=(0, 2))
        phase = phase._replace(left=jnp.where(alive, phase.left - 1, 0))
        after = es.forget(after, jnp.tile(phase.left == 0, 2))
        metrics = {
            **population_metrics(losses, finite),
            **es.metrics(asked, after),
            "lr": lr(state.generation),
            "num_steps": jnp.mean(phase.length),
            "inner_steps": jnp.array(losses.size * config.tasks * len(groups) * config.truncation),
        }
        state = PESState(
            theta=es.theta(after),
            strategy=after,
            runs=runs,
            phase=phase,
            generation=state.generation + jnp.any(finite),
        )
        return state, metrics

    def specs(state: PESState) -> PESState:
        return devices.specs_of(state)._replace(runs=devices.specs_of(state.runs, of_both))

    return MetaTrainer(init, step, lambda state: state.theta, specs, data=groups)


def _phases(config: PESConfig, keys, generation) -> Phase:
    """Phases ``[pairs]`` of pairs that begin now; the very first runs are cut to end in turn."""
    phase = jax.vmap(new_phase, in_axes=(None, 0, None))(config, keys, generation)
    pairs = len(keys)
    cut = 1 + jnp.arange(pairs) * phase.left // pairs
    return phase._replace(left=jnp.where(generation == 0, cut, phase.left))


def _window(
    lopt: LearnedOptimizer,
    config: PESConfig,
    chunk: int,
    family: TaskFamily,
    thetas: Theta,
    keys: Keys,
    runs: InnerRun,
    phase: Phase,
    fresh: jax.Array,
) -> tuple[jax.Array, jax.Array, InnerRun]:
    """One window of all particles of a task group.

    Args:
      lopt: as in `pes`.
      config: as in `pes`.
      chunk: pairs at a time; 0: as many as are fastest.
      family: the tasks of the group.
      thetas: of the particles, [2, pairs].
      keys: of the mini-batches, and of the starts of new runs, [pairs, tasks].
      runs: the runs before the window, [2, pairs, tasks].
      phase: of the pairs, [pairs].
      fresh: which pairs start a new run, [pairs].

    Returns:
      Losses, whether all numbers of a run are finite, and the runs after the window, all
      [2, pairs, tasks].
    """

    def of_run(theta: Theta, start: Start, run: InnerRun, phase: Phase, fresh: jax.Array):
        new = begin(lopt, family, config, theta, start, phase.length)
        run = optax.tree.where(fresh, new, run)
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

    over_tasks = jax.vmap(of_run, in_axes=(None, 0, 0, None, None))
    of_pair = jax.vmap(over_tasks, in_axes=(0, None, 0, None, None))

    def move_axis(tree: Any, source: int, destination: int) -> Any:
        return jax.tree.map(lambda x: jnp.moveaxis(x, source, destination), tree)

    by_pair = (
        move_axis(thetas, 0, 1),
        starts(family, keys),
        move_axis(runs, 0, 1),
        phase,
        fresh,
    )
    bytes_each = nbytes((runs.params, runs.state)) // phase.left.size
    results = cpu.for_each(lambda pair: of_pair(*pair), by_pair, bytes_each, chunk)
    return move_axis(results, 1, 0)
