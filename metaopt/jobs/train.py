"""`metaopt train`: meta-train a learned optimizer and export it."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax
import numpy as np

from metaopt import meta
from metaopt.core.checks import check_fields, check_integer, check_number
from metaopt.core.files import read_plain, write_whole
from metaopt.core.types import Theta
from metaopt.jobs.subcommands import subcommands
from metaopt.meta import METHODS, NESConfig, devices
from metaopt.meta.loop import EXPORT, METRICS, WARM_START, read_metrics, train
from metaopt.optimizers import L3RS, OPTIMIZERS, Settings
from metaopt.tasks import catalog
from metaopt.zoo import exports

LARGEST_SEED = 2**32 - 1
MOST_STEPS = 2**31 - 1  # meta-updates are counted in int32
UNBOUNDED = 10**9  # meta-updates of a run that only its minutes end
# Fields of a `TrainJob` that may change when its run is resumed.
WHERE_AND_HOW = (
    "out",
    "overwrite",
    "resume_changed",
    "tensorboard",
    "checkpoint_every",
    "minutes",
    "population_chunk",
    "coordinator",
    "num_processes",
    "process_id",
    "cpu_devices",
)

if TYPE_CHECKING:
    LearnedSettings: TypeAlias = Settings
    MethodSettings: TypeAlias = meta.Method
else:
    LearnedSettings = subcommands(OPTIMIZERS)
    MethodSettings = subcommands(METHODS)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Meta-train a learned optimizer and export it.

    Attributes:
      task: a built-in task, or your own as package.module:function (returns a metaopt.Task or
        TaskFamily); several, separated by commas, are trained on together.
      learned: which optimizer, and its settings.
      method: which meta-training method, and its settings; docs/meta-training.md compares them.
      steps: meta-updates of the whole run; by default 300, or with minutes as many as fit.
      minutes: the run ends after this time, which includes its earlier parts; 0: no bound.
      validate_every: meta-updates between two validations; the best theta is exported.
      validate_on: what is best: the held-out loss at the end of runs (final), the mean training
        loss along them (trajectory), or the mean logarithm of the held-out losses after each
        quarter (anytime). To the last two a fast start counts too; on few training data, a training
        loss says little.
      validate_at: on runs of the longest length, or of all: the shortest, a middle and the longest.
      checkpoint_every: meta-updates between two checkpoints, i.e. what a killed run may lose.
      warm_start: export or run folder whose theta is the start; empty: a fresh one.
      seed: fixes all randomness.
      out: folder of the run; an interrupted run goes on when the command is given again.
      overwrite: start afresh where the folder holds a run.
      resume_changed: go on with a run whose configuration was another one.
      tensorboard: write TensorBoard event files too (extra: metaopt-jax[tensorboard]).
      population_chunk: candidates (nes), pairs (pes) or runs (tbptt) that a device takes at a time,
        which bounds its memory; 0: all of its share, or on CPU as many as are fastest.
      coordinator: auto joins the processes that Slurm, Open MPI or a TPU pod started; host:port
        of process 0 joins those that are given it; none joins nothing.
      num_processes: with host:port: how many processes there are.
      process_id: with host:port: which one this is, from 0.
      cpu_devices: devices that this process divides the CPU into, which share the work; 0: one
        per core.
    """

    task: str = "digits"
    learned: LearnedSettings = field(default_factory=L3RS)
    method: MethodSettings = field(default_factory=NESConfig)
    steps: int | None = None
    minutes: float = 0.0
    validate_every: int = 25
    validate_on: Literal["final", "trajectory", "anytime"] = "final"
    validate_at: Literal["longest", "all"] = "longest"
    checkpoint_every: int = 25
    warm_start: str = ""
    seed: int = 0
    out: Path = Path("runs/train")
    overwrite: bool = False
    resume_changed: bool = False
    tensorboard: bool = False
    population_chunk: int = 0
    coordinator: str = "auto"
    num_processes: int | None = None
    process_id: int | None = None
    cpu_devices: int = 0

    def __post_init__(self):
        check_fields(self)
        for name in ("steps", "validate_every", "checkpoint_every"):
            if (value := getattr(self, name)) is not None:
                check_integer(f"TrainJob.{name}", value, 1)
        for name in ("minutes", "population_chunk", "cpu_devices"):
            check_number(f"TrainJob.{name}", getattr(self, name), least=0)
        check_number("TrainJob.steps", self.max_steps, most=MOST_STEPS)
        check_number("TrainJob.seed", self.seed, least=0, most=LARGEST_SEED)
        if not self.tasks:
            raise ValueError("TrainJob.task must name at least one task, got none.")

    @property
    def tasks(self) -> list[str]:
        """The names in `task`."""
        return [name.strip() for name in self.task.split(",") if name.strip()]

    @property
    def max_steps(self) -> int:
        """`steps`, or its default if it is None."""
        return self.steps or (UNBOUNDED if self.minutes else 300)

    @property
    def validation_lengths(self) -> tuple[int, ...]:
        """Steps of the runs that decide which theta is best."""
        shortest, longest = self.method.horizon
        if self.validate_at == "longest":
            return (longest,)
        return meta.lengths_between(shortest, longest)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide which theta a run gives, as plain JSON data.

        A resumed run must have the same ones.
        """
        settings = dataclasses.asdict(self)
        settings["steps"] = self.max_steps
        for name in ("learned", "method"):
            settings[name] = {"name": getattr(self, name).name, **settings[name]}
        for name in WHERE_AND_HOW:
            del settings[name]
        return json.loads(json.dumps(settings))


def run(job: TrainJob) -> None:
    """Runs a `TrainJob`, and prints the folder of the exported optimizer and how to judge it."""
    folder = meta_train(job)
    if jax.process_index() > 0:  # process 0 exports; the others do not wait for it
        return
    trained, note = exports.load(folder).trained, ""
    if trained["validation_loss"] is None:
        note = ", the theta that it began with: no loss on held-out runs was finite"
    elif not trained["improved"]:
        note = ", the theta that it began with: no update was better on held-out runs"
    print(f"exported {folder}{note}")
    steps = job.method.horizon[1]
    print(
        "compare it with tuned baselines: "
        f"metaopt evaluate {job.out} --task {job.task} --num-steps {steps}",
        file=sys.stderr,
    )


def meta_train(job: TrainJob) -> Path:
    """Runs a `TrainJob` and returns the folder of the exported optimizer.

    With several processes, each calls it with the same job except for `process_id`.
    """
    devices.initialise(job.coordinator, job.num_processes, job.process_id, job.cpu_devices)
    lopt = job.learned.build()
    warm_theta = _warm_start(job)
    families = [catalog.family(name) for name in job.tasks]
    k_theta, k_task, k_params = jax.random.split(jax.random.key(job.seed), 3)
    params = families[0].task(families[0].sample(k_task)).init(k_params)
    theta = lopt.init(k_theta, params)
    if warm_theta is not None:
        exports.check_same_structure(f"warm_start: {job.warm_start}", theta, warm_theta)
        theta = warm_theta
    spread = devices.Spread(job.method.mesh(), job.population_chunk)
    best, loss = train(
        job.method.trainer(lopt, families, spread),
        theta,
        steps=job.max_steps,
        minutes=job.minutes,
        seed=job.seed,
        out=job.out,
        config=job.identity,
        validate=meta.validation(
            lopt, families, job.validation_lengths, on=job.validate_on, mesh=spread.mesh
        ),
        validate_every=job.validate_every,
        checkpoint_every=job.checkpoint_every,
        label=f"{job.learned.name} by {job.method.name} on {job.task}",
        about=f"a meta-update: {job.method.work(len(families))}",
        overwrite=job.overwrite,
        resume_changed=job.resume_changed,
        tensorboard=job.tensorboard,
        mesh=spread.mesh,
    )
    if jax.process_index() > 0:  # process 0 exports
        return job.out / EXPORT
    _copy_warm_start_metrics(job)
    unchanged = jax.tree.map(np.array_equal, best, theta)
    trained = {
        **job.identity,
        "num_steps": list(job.method.horizon),
        "cost": _cost(job),
        "validation_loss": loss if math.isfinite(loss) else None,
        "improved": not all(jax.tree.leaves(unchanged)),
    }
    return exports.save(job.out / EXPORT, job.learned, best, trained)


def _cost(job: TrainJob) -> dict[str, float] | None:
    """Inner steps and seconds of the meta-updates, and what the warm start has cost, if known."""
    if not (job.out / METRICS).exists():
        return None
    metrics = read_metrics(job.out)
    steps = metrics.get("step", np.zeros(0))
    if not len(steps) or not np.array_equal(steps, np.arange(len(steps))):
        return None  # lines are missing
    cost = {name: float(np.nansum(metrics[name])) for name in ("inner_steps", "seconds")}
    if not job.warm_start:
        return cost
    before = exports.load(job.warm_start).cost
    return {name: value + before[name] for name, value in cost.items()} if before else None


def _copy_warm_start_metrics(job: TrainJob) -> None:
    """Copies the metrics of the run that this one started from, so that reports draw both."""
    start = Path(job.warm_start)
    metrics = (start.parent if start.name == EXPORT else start) / METRICS
    if job.warm_start and metrics.exists():
        write_whole(job.out / WARM_START, read_plain(metrics))


def _warm_start(job: TrainJob) -> Theta | None:
    """The theta to start from, or None if the job names no export."""
    if not job.warm_start:
        return None
    export = exports.load(job.warm_start)
    if export.settings != job.learned:
        raise ValueError(
            f"warm_start: {job.warm_start} holds {export.settings}, but this run trains "
            f"{job.learned}."
        )
    return export.theta
