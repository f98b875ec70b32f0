"""Truncated back-propagation through the inner run, Adam on theta after every window."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_number
from metaopt.core.rollouts import unroll
from metaopt.core.trees import all_finite, nbytes
from metaopt.core.types import LearnedOptimizer, TaskFamily, Theta
from metaopt.meta import devices
from metaopt.meta.base import MetaTrainer, as_groups, check_serves, check_theta, starts
from metaopt.meta.population import for_each
from metaopt.meta.updates import decayed, meta_optimizer, population_metrics
from metaopt.meta.windows import InnerRun, Phase, WindowsConfig, begin, new_phase


@dataclass(frozen=True, kw_only=True)
class TBPTTConfig(WindowsConfig):
    """Settings of truncated back-propagation; those of its windows are in `WindowsConfig`.

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


class TBPTTState(NamedTuple):
    """State between two windows.

    Attributes: theta; mean: the running mean of it; optimizer: Adam's state; runs, phases: one
    `InnerRun` and one `Phase` with leading axis [tasks] per task group; update: meta-updates made,
    int32 [].
    """

    theta: Theta
    mean: Theta
    optimizer: Any
    runs: tuple[InnerRun, ...]
    phases: tuple[Phase, ...]
    update: Int[Array, ""]


def tbptt(
    lopt: LearnedOptimizer,
    families: TaskFamily | Sequence[TaskFamily],
    config: TBPTTConfig,
    mesh: Mesh | None = None,
) -> MetaTrainer:
    """Truncated back-propagation through time.

    The loss of a window is the mean over its steps of the training losses (each on its own
    mini-batch), the one after its last update included. Params and optimizer state are carried
    to the next window as constants. A run that turned non-finite, or reached its end, starts
    afresh.

    The meta-gradient is the mean of those of single runs, of the finite ones: a run whose loss or
    gradient is not finite counts as `non_finite` and moves nothing. Runs that begin all together
    (the first ones do) are cut short, each elsewhere, so that from then on all phases of a run are
    present in every meta-update: where the ends of long runs diverge, their beginnings still teach.

    Args:
      lopt: what is trained.
      families: where its tasks come from; of several (networks or data sets of different
        structure) `config.tasks` runs each go side by side.
      config: see `TBPTTConfig`.
      mesh: devices that share the tasks of every family evenly; the state of a run stays where it
        is, and only losses and a sum of meta-gradients cross.

    Raises: ValueError: the tasks do not divide over the devices; at `init`: theta is empty, not
      float32, or does not fit every family.

    References: Andrychowicz et al. 2016 and their released code; LGL2O, section 4.
    """
    groups = as_groups(families)
    devices.check_shares("tbptt: tasks", config.tasks, mesh)
    of_runs, whole = devices.runs_on_axis(0), devices.WHOLE
    windows = [
        devices.over_runs(
            _windows_and_gradients(lopt, family, config),
            mesh,
            (whole, of_runs, of_runs, of_runs, whole, of_runs),
            of_runs,
        )
        for family in groups
    ]
    lr = decayed(config.lr, config.half_life)
    optimizer = optax.apply_if_finite(
        meta_optimizer("adam", lr, clip=config.clip),
        max_consecutive_errors=jnp.iinfo(jnp.int32).max,
    )
    start_keys = lambda key: jax.random.split(key, (len(groups), config.tasks))

    def init(key, theta):
        check_theta("tbptt", theta)
        check_serves("tbptt", lopt, groups, theta)
        length = jnp.asarray(config.rollout, jnp.int32)
        runs = [
            jax.vmap(
                lambda start, family=family: begin(lopt, family, config, theta, start, length)
            )(starts(family, keys))
            for family, keys in zip(groups, start_keys(key), strict=True)
        ]
        ended = Phase(jnp.full(config.tasks, length), jnp.zeros(config.tasks, jnp.int32))
        update = jnp.zeros([], jnp.int32)
        phases = (ended,) * len(groups)
        return TBPTTState(theta, theta, optimizer.init(theta), tuple(runs), phases, update)

    def step(key, state: TBPTTState):
        outcomes = [
            window(state.theta, keys, run, phase, state.update, _places(phase))
            for window, keys, run, phase in zip(
                windows, start_keys(key), state.runs, state.phases, strict=True
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
        mean = optax.incremental_update(theta, state.mean, 1.0 - config.average)
        return TBPTTState(theta, mean, opt_state, runs, phases, state.update + 1), metrics

    def specs(state: TBPTTState):
        return devices.specs_of(state)._replace(runs=devices.specs_of(state.runs, of_runs))

    return MetaTrainer(init, step, lambda state: state.mean, specs)


def finite_mean(
    losses: Sequence[Float[Array, " n"]], grads: Sequence[Theta]
) -> tuple[jax.Array, Theta]:
    """Which runs have a finite loss and gradient, over all groups, and the mean gradient of those.

    NaN where there is none. Gradients are masked one by one, since back-propagation can fail where
    the loss is fine, and no `where` on losses keeps a NaN out of the gradient of their mean.
    """
    finite = [
        jnp.isfinite(loss) & jax.vmap(all_finite)(grad)
        for loss, grad in zip(losses, grads, strict=True)
    ]
    number = sum(jnp.sum(of_group) for of_group in finite)

    def mean(*parts):
        kept = [
            jnp.sum(jnp.where(of_group.reshape(-1, *[1] * (g.ndim - 1)), g, 0.0), axis=0)
            for of_group, g in zip(finite, parts, strict=True)
        ]
        return sum(kept) / number

    return jnp.concatenate(finite), jax.tree.map(mean, *grads)


def _places(phases: Phase) -> jax.Array:
    """Where runs ``[n]`` that begin now stand in a queue: 0, or if all begin, 0, 1, ..., n - 1."""
    return jnp.where(jnp.all(phases.left == 0), jnp.arange(phases.left.size), 0)


def _windows_and_gradients(lopt: LearnedOptimizer, family: TaskFamily, config: TBPTTConfig):
    """One window of all runs: ``(theta, key, run, phase, update, place) -> loss, gradient, run,
    phase``; all but theta and update, which runs share, are [tasks].
    """

    def loss_of(theta, start, run: InnerRun, phase: Phase, update, place):
        fresh = phase.left == 0
        new = new_phase(config, jax.random.fold_in(start.key, 1), update)
        new = new._replace(left=new.left - place * new.left // config.tasks)
        phase = optax.tree.where(fresh, new, phase)
        run = optax.tree.where(fresh, begin(lopt, family, config, theta, start, phase.length), run)
        task = family.task(run.task_params)
        batches = task.sample(start.key, (config.truncation + 1,))
        train, last = (
            jax.tree.map(lambda a: a[:-1], batches),
            jax.tree.map(lambda a: a[-1], batches),
        )
        params, state, losses = unroll(
            lopt.apply(theta, num_steps=phase.length),
            run.params,
            run.state,
            task.loss,
            train,
            second_order=config.second_order,
            remat=True,
        )
        final = task.loss(params, last)
        loss = (jnp.sum(losses) + final) / (config.truncation + 1) / run.unit
        left = jnp.where(all_finite(params, state, final), phase.left - 1, 0)
        carried = run._replace(params=params, state=state), phase._replace(left=left)
        if config.objective == "loss":
            return loss, (loss, *carried)
        loss = jnp.where(loss > 0, loss, jnp.nan)
        return jnp.log(loss), (loss, *carried)

    def window(*arguments):
        (_, (loss, *carried)), grad = jax.value_and_grad(loss_of, has_aux=True)(*arguments)
        return loss, grad, *carried

    def windows(theta, keys, run, phase, update, place):
        of_run = lambda own: window(theta, *own[:3], update, own[3])
        states = config.truncation + 1  # back-propagation goes through all of them
        held = states * nbytes((run.params, run.state)) // place.size
        return for_each(of_run, (starts(family, keys), run, phase, place), held)

    return windows
