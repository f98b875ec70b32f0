"""Truncated back-propagation through inner runs, with a step of Adam on theta per window."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from metaopt.core import cpu
from metaopt.core.checks import check_number
from metaopt.core.rollouts import held_model_state, train_loss, unroll
from metaopt.core.trees import all_finite, nbytes
from metaopt.core.types import Families, Key, Keys, LearnedOptimizer, TaskFamily, Theta
from metaopt.meta import devices
from metaopt.meta.base import MetaTrainer, Start, check_theta, checked_groups, starts
from metaopt.meta.devices import EVERYTHING_HERE, Spread
from metaopt.meta.sharing import even_mesh
from metaopt.meta.updates import decayed, meta_optimizer, population_metrics
from metaopt.meta.windows import InnerRun, Phase, WindowsConfig, begin, new_phase


@dataclass(frozen=True, kw_only=True)
class TBPTTConfig(WindowsConfig):
    """TBPTT: truncated back-propagation through inner runs.

    Attributes:
      lr: learning rate of Adam on theta at meta-update 0.
      half_life: meta-updates after which lr is halved (smoothly); 0 keeps it.
      clip: bound on the norm of the meta-gradient; 0 leaves it as it is.
      average: weight of the past in a running mean of theta, which then is what is validated and
        exported: it has less of the noise of single windows. 0: theta itself.
      objective: "loss": a window's loss; "log": its logarithm, so that the late windows of a run,
        whose losses and gradients are small, weigh as much as the first ones (losses must be
        positive: a run whose loss has no logarithm counts as not finite).
      second_order: differentiate through the gradients that the optimizer sees.
    """

    name: ClassVar[str] = "tbptt"
    lr: float = 1e-3
    half_life: int = 0
    clip: float = 0.0
    average: float = 0.0
    objective: Literal["loss", "log"] = "loss"
    second_order: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("lr", "half_life", "clip"):
            check_number(f"TBPTTConfig.{name}", getattr(self, name), least=0)
        check_number("TBPTTConfig.average", self.average, least=0, below=1)

    def work(self, groups: int) -> str:
        """What a meta-update does, in words, for tasks of `groups` groups."""
        return self.windows(self.tasks * groups)

    def mesh(self) -> Mesh | None:
        """The devices that share the inner runs evenly; None for a single device."""
        return even_mesh("TBPTTConfig.tasks", self.tasks)

    def trainer(
        self,
        lopt: LearnedOptimizer,
        families: Families,
        spread: Spread = EVERYTHING_HERE,
    ) -> MetaTrainer:
        """See `tbptt`."""
        return tbptt(lopt, families, self, spread)


class TBPTTState(NamedTuple):
    """State between two windows.

    Attributes:
      theta: the meta-parameters.
      mean: their running mean.
      optimizer: Adam's state.
      runs: one `InnerRun` per task group, with leading axis [tasks].
      phases: one `Phase` per task group, [tasks].
      update: meta-updates so far, int32 [].
    """

    theta: Theta
    mean: Theta
    optimizer: Any
    runs: tuple[InnerRun, ...]
    phases: tuple[Phase, ...]
    update: Int[Array, ""]


def tbptt(
    lopt: LearnedOptimizer,
    families: Families,
    config: TBPTTConfig,
    spread: Spread = EVERYTHING_HERE,
) -> MetaTrainer:
    """Truncated back-propagation through time.

    The loss of a window is the mean over its steps of the training losses (each on its own
    mini-batch), including the loss after its last update. Params and optimizer state enter the
    next window as constants. A run that became non-finite, or reached its end, starts again.

    The meta-gradient is the mean of the gradients of single runs, over the finite ones: a run whose
    loss or gradient is not finite counts as `non_finite` and has no effect. Runs that begin at the
    same time (the first ones do) are cut to different lengths, so that every later meta-update
    contains all phases of a run: where the ends of long runs diverge, their beginnings still teach.

    Args:
      lopt: the optimizer to train.
      families: a family of tasks, a task, or several of them. With several (networks or data sets
        of different structure) `config.tasks` runs of each go side by side.
      config: see `TBPTTConfig`.
      spread: the devices that share the tasks of every family evenly, and how many runs each takes
        at a time. The state of a run stays on its device; only losses and a sum of meta-gradients
        are communicated.

    Returns:
      The meta-trainer; its `init` takes the initial theta.

    Raises:
      ValueError: a family is not usable, or the devices cannot share the tasks evenly. At `init`:
        theta is empty, not float32, or does not fit the tasks of every family.

    References:
      Andrychowicz et al. 2016 and their released code; LGL2O, section 4.
    """
    if not isinstance(config, TBPTTConfig):
        raise ValueError(f"tbptt: config must be a TBPTTConfig, got a {type(config).__name__}.")
    groups, mesh = checked_groups("tbptt", families), spread.mesh
    devices.check_shares("tbptt: tasks", config.tasks, mesh)
    of_runs, whole = devices.runs_on_axis(0), devices.WHOLE
    window = devices.over_runs(
        partial(_window, lopt, config, spread.chunk),
        mesh,
        (whole, whole, of_runs, of_runs, of_runs, whole, of_runs),
        of_runs,
    )
    lr = decayed(config.lr, config.half_life)
    optimizer = optax.apply_if_finite(
        meta_optimizer("adam", lr, clip=config.clip),
        max_consecutive_errors=jnp.iinfo(jnp.int32).max,
    )

    def start_keys(key: Key) -> Keys:
        return jax.random.split(key, (len(groups), config.tasks))

    def init(groups: Sequence[TaskFamily], key: Key, theta: Theta) -> TBPTTState:
        check_theta("tbptt", lopt, groups, theta)
        length = jnp.asarray(config.rollout, jnp.int32)
        runs = []
        for family, keys in zip(groups, start_keys(key), strict=True):
            first = partial(begin, lopt, family, config, theta, length=length)
            runs.append(jax.vmap(first)(starts(family, keys)))
        ended = Phase(
            length=jnp.full(config.tasks, length), left=jnp.zeros(config.tasks, jnp.int32)
        )
        return TBPTTState(
            theta=theta,
            mean=theta,
            optimizer=optimizer.init(theta),
            runs=tuple(runs),
            phases=(ended,) * len(groups),
            update=jnp.zeros([], jnp.int32),
        )

    def step(groups: Sequence[TaskFamily], key: Key, state: TBPTTState):
        outcomes = [
            window(family, state.theta, keys, run, phase, state.update, _places(phase))
            for family, keys, run, phase in zip(
                groups, start_keys(key), state.runs, state.phases, strict=True
            )
        ]
        losses, grads, runs, phases = zip(*outcomes, strict=True)
        finite, grad = finite_mean(losses, grads)
        losses, phases, grad = devices.gathered((jnp.concatenate(losses), phases, grad), mesh)
        updates, opt_state = optimizer.update(grad, state.optimizer, state.theta)
        metrics = {
            **population_metrics(losses, jnp.isfinite(losses)),
            "non_finite": jnp.sum(~finite),
            "grad_norm": optax.tree.norm(grad),
            "lr": lr(state.update - state.optimizer.total_notfinite),
            "num_steps": jnp.mean(jnp.concatenate([phase.length for phase in phases])),
            "inner_steps": jnp.array(config.truncation * config.tasks * len(groups)),
        }
        theta = optax.apply_updates(state.theta, updates)
        state = TBPTTState(
            theta=theta,
            mean=optax.incremental_update(theta, state.mean, 1.0 - config.average),
            optimizer=opt_state,
            runs=runs,
            phases=phases,
            update=state.update + 1,
        )
        return state, metrics

    def specs(state: TBPTTState) -> TBPTTState:
        return devices.specs_of(state)._replace(runs=devices.specs_of(state.runs, of_runs))

    return MetaTrainer(init, step, lambda state: state.mean, specs, data=groups)


def finite_mean(
    losses: Sequence[Float[Array, " n"]], grads: Sequence[Theta]
) -> tuple[jax.Array, Theta]:
    """The mean gradient of the runs whose loss and gradient are finite; NaN where there is none.

    Gradients are masked one by one: back-propagation can fail where the loss is finite, and a
    `where` on losses does not keep a NaN out of the gradient of their mean.

    Returns:
      Which runs are finite, of all groups, and the mean gradient.
    """
    finite = [
        jnp.isfinite(loss) & jax.vmap(all_finite)(grad)
        for loss, grad in zip(losses, grads, strict=True)
    ]
    number = sum(jnp.sum(of_group) for of_group in finite)

    def mean(*parts: jax.Array) -> jax.Array:
        sums = []
        for of_group, part in zip(finite, parts, strict=True):
            mask = of_group.reshape(-1, *[1] * (part.ndim - 1))
            sums.append(jnp.sum(jnp.where(mask, part, 0.0), axis=0))
        return jnp.asarray(sum(sums) / number)

    return jnp.concatenate(finite), jax.tree.map(mean, *grads)


def _places(phases: Phase) -> jax.Array:
    """The place of each run ``[n]`` in a queue: 0, or 0, 1, ..., n - 1 if all runs begin now."""
    return jnp.where(jnp.all(phases.left == 0), jnp.arange(phases.left.size), 0)


def _window(
    lopt: LearnedOptimizer,
    config: TBPTTConfig,
    chunk: int,
    family: TaskFamily,
    theta: Theta,
    keys: Keys,
    runs: InnerRun,
    phases: Phase,
    update: Int[Array, ""],
    places: Int[Array, " tasks"],
) -> tuple[jax.Array, Theta, InnerRun, Phase]:
    """One window of all runs of a task group, and its gradients.

    Args:
      lopt: as in `tbptt`.
      config: as in `tbptt`.
      chunk: runs at a time; 0: as many as are fastest.
      family: the tasks of the group.
      theta: the meta-parameters.
      keys: of the mini-batches, and of the starts of new runs, [tasks].
      runs: the runs before the window, [tasks].
      phases: of the runs, [tasks].
      update: meta-updates so far.
      places: of runs that begin now, see `_places`.

    Returns:
      Losses, gradients with respect to theta, runs and phases after the window, all [tasks].
    """

    def loss_of(theta: Theta, start: Start, run: InnerRun, phase: Phase, place: jax.Array):
        fresh = phase.left == 0
        new = new_phase(config, jax.random.fold_in(start.key, 1), update)
        new = new._replace(left=new.left - place * new.left // config.tasks)
        phase = optax.tree.where(fresh, new, phase)
        run = optax.tree.where(fresh, begin(lopt, family, config, theta, start, phase.length), run)
        task = family.task(run.task_params)
        batches = task.sample(start.key, (config.truncation + 1,))
        train = jax.tree.map(lambda a: a[:-1], batches)
        last = jax.tree.map(lambda a: a[-1], batches)
        params, state, losses = unroll(
            lopt.apply(theta, num_steps=phase.length),
            run.params,
            run.state,
            task.loss,
            train,
            second_order=config.second_order,
            remat=True,
        )
        final = train_loss(task.loss, params, held_model_state(state), last)
        loss = (jnp.sum(losses) + final) / (config.truncation + 1) / run.unit
        left = jnp.where(all_finite(params, state, final), phase.left - 1, 0)
        run, phase = run._replace(params=params, state=state), phase._replace(left=left)
        if config.objective == "loss":
            return loss, (loss, run, phase)
        loss = jnp.where(loss > 0, loss, jnp.nan)
        return jnp.log(loss), (loss, run, phase)

    def of_run(own: tuple[Start, InnerRun, Phase, jax.Array]):
        (_, (loss, run, phase)), grad = jax.value_and_grad(loss_of, has_aux=True)(theta, *own)
        return loss, grad, run, phase

    # Back-propagation keeps the state of every step.
    bytes_each = (config.truncation + 1) * nbytes((runs.params, runs.state)) // places.size
    return cpu.for_each(of_run, (starts(family, keys), runs, phases, places), bytes_each, chunk)
