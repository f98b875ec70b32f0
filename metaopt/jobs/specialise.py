"""`metaopt specialise`: a search, a meta-training and an evaluation, with settings of its own."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import Progress

from metaopt import meta
from metaopt.core.checks import check_fields, check_integer, check_number
from metaopt.core.trees import leaf_names
from metaopt.core.types import TaskFamily
from metaopt.jobs.evaluate import EvaluateJob, evaluate_suite
from metaopt.jobs.train import LARGEST_SEED, TrainJob, meta_train
from metaopt.meta import NESConfig, devices, search
from metaopt.meta.loop import CONFIG
from metaopt.optimizers import L3RS
from metaopt.optimizers.bases import resolve
from metaopt.tasks import catalog
from metaopt.zoo import exports

RUNS = 8  # of each task, that a point of the search is judged on; half of them at several lengths
FIXED = 300  # steps: longer runs are trained on shorter ones too, since these cost less


@dataclass(frozen=True, kw_only=True)
class SpecialiseJob:
    """Specialise an optimizer to your own kind of runs, and see when that pays.

    Attributes:
      task: what to train on: a built-in task, or your own as package.module:function (returns a
        metaopt.Task or TaskFamily); several, separated by commas.
      held_out: tasks that the result is judged on; empty: new runs of the same tasks.
      num_steps: steps of a run.
      min_steps: steps of the shortest run, where your runs differ in length; 0: all are alike.
      minutes: time of the meta-training; the search before it and the evaluation come on top. 0: no
        meta-training, the result is that of the search.
      points: optimizers that the search tries: base, schedule, and learning rate by layer, or else
        how it depends on the horizon and on the size of a layer, and the constants of the base.
      bases: base optimizers that L3RS mixes, of metaopt.optimizers.BASES, separated by commas.
      any_network: make an optimizer for networks of any structure; it gains less on those that it
        is trained on. By default it tells layers apart, if all tasks have the same ones.
      baselines: tuned optimizers that it is compared with; see metaopt evaluate.
      seeds: runs per optimizer and task of the evaluation.
      workers: processes that share the tasks of the evaluation.
      seed: fixes all randomness.
      out: folder of all parts; the command, given again, goes on where it was.
      overwrite: start afresh.
    """

    task: tyro.conf.Positional[str] = "digits"
    held_out: str = ""
    num_steps: int = 100
    min_steps: int = 0
    minutes: float = 10.0
    points: int = 64
    bases: str = "sgd,adam,lion"
    any_network: bool = False
    baselines: str = "adam,adamw,schedule-free-adamw,muon"
    seeds: int = 10
    workers: int = 1
    seed: int = 0
    out: Path = Path("runs/specialise")
    overwrite: bool = False

    def __post_init__(self):
        check_fields(self)
        for name in ("num_steps", "points", "seeds", "workers"):
            check_integer(f"SpecialiseJob.{name}", getattr(self, name), 1)
        check_number("SpecialiseJob.min_steps", self.min_steps, least=0, most=self.num_steps)
        check_number("SpecialiseJob.minutes", self.minutes, least=0)
        check_number("SpecialiseJob.seed", self.seed, least=0, most=LARGEST_SEED)
        for name in ("task", "bases", "baselines"):
            if not getattr(self, name).replace(",", "").strip():
                raise ValueError(f"SpecialiseJob.{name} must name at least one, got none.")
        resolve(self.base_names)
        self.evaluation()  # checks the rest

    @property
    def base_names(self) -> tuple[str, ...]:
        """The names in `bases`."""
        return tuple(name.strip() for name in self.bases.split(",") if name.strip())

    @property
    def start(self) -> Path:
        """Folder of the export that the search ends with."""
        return self.out / ("searched" if self.minutes else "L3RS")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of the runs that points of the search are judged on."""
        return meta.lengths_between(self.min_steps or self.num_steps, self.num_steps)

    @property
    def runs(self) -> int:
        """Runs of each task and length that a point of the search is judged on."""
        return RUNS if len(self.lengths) == 1 else RUNS // 2

    @property
    def window(self) -> int:
        """Mini-batches of a window in the evaluation: at least 10 windows, if the steps allow."""
        largest = max(min(10, self.num_steps // 10), 1)
        return max(n for n in range(1, largest + 1) if self.num_steps % n == 0)

    def training(self, learned: L3RS) -> TrainJob:
        """The meta-training, which starts where the search ended."""
        alike = self.num_steps if self.num_steps <= FIXED else max(FIXED, self.num_steps // 4)
        return TrainJob(
            task=self.task,
            learned=learned,
            method=NESConfig(
                population=16,
                tasks=4,
                min_steps=self.min_steps or alike,
                max_steps=self.num_steps,
                lengths="log_uniform" if self.min_steps else "uniform",
                objective="anytime",
            ),
            minutes=self.minutes,
            validate_on="anytime",
            validate_at="all" if self.min_steps else "longest",
            warm_start=str(self.start),
            seed=self.seed,
            out=self.out / "L3RS",
            overwrite=self.overwrite,
        )

    def evaluation(self) -> EvaluateJob:
        """The comparison of the result with the search's and with tuned baselines."""
        return EvaluateJob(
            checkpoints=tuple(dict.fromkeys((self.start, self.out / "L3RS"))),
            task=self.held_out or self.task,
            num_steps=self.num_steps,
            window=self.window,
            baselines=self.baselines,
            guards="race",
            fallback=self.baselines.split(",")[0].strip(),
            seeds=self.seeds,
            workers=self.workers,
            out=self.out / "evaluation",
            overwrite=self.overwrite,
        )


def run(job: SpecialiseJob) -> None:
    """Runs a `SpecialiseJob`, writes its report and prints its summary."""
    from metaopt import report

    report.print_summary(report.report(specialise(job)))


def specialise(job: SpecialiseJob, console: Console | None = None) -> Path:
    """Runs a `SpecialiseJob` and returns the folder of the evaluation's records.

    Args:
      job: the job.
      console: where it says what it does; by default stderr.
    """
    console = console or Console(stderr=True)
    search_and_train(job, console)
    tasks = job.held_out or job.task
    _say(console, f"evaluation: {tasks}, {job.seeds} runs beside tuned {job.baselines}")
    return evaluate_suite(job.evaluation())


def search_and_train(job: SpecialiseJob, console: Console | None = None) -> Path:
    """The first two parts of a `SpecialiseJob`; returns the folder of the exported optimizer.

    Args:
      job: the job.
      console: where it says what it does; by default stderr.
    """
    devices.initialise()  # before the first use of JAX
    console = console or Console(stderr=True)
    families = [catalog.family(name) for name in job.training(L3RS()).tasks]
    learned = choose(families, job.base_names, job.any_network)
    _say(console, _plan(job, learned, families))
    found = _searched(job, learned, families, console)
    _say(console, f"search: {point_text(found.trained['search']['point'])}")
    return meta_train(job.training(learned)) if job.minutes else job.start


def choose(families: list[TaskFamily], bases: tuple[str, ...], any_network: bool = False) -> L3RS:
    """The settings of L3RS for these tasks.

    Args:
      families: the tasks; L3RS tells their layers apart if all of them have the same ones.
      bases: names of its base optimizers.
      any_network: let it fit networks of any structure, and tell no layers apart.
    """
    names = [leaf_names(_params(family)) for family in families]
    apart = not any_network and all(other == names[0] for other in names)
    variant = "embedding" if apart else "none"
    return L3RS(base=bases, variant=variant, hidden=(16,), lambda_0=0.1)


def _params(family: TaskFamily) -> Any:
    """Shapes of the params of a task of the family."""

    def init(key):
        k_task, k_params = jax.random.split(key)
        return family.task(family.sample(k_task)).init(k_params)

    return jax.eval_shape(init, jax.random.key(0))


def _plan(job: SpecialiseJob, learned: L3RS, families: list[TaskFamily]) -> str:
    shapes = [jax.tree.leaves(_params(family)) for family in families]
    sizes = ", ".join(f"{sum(x.size for x in s):,} numbers in {len(s)} leaves" for s in shapes)
    apart = "tells the leaves apart" if learned.variant == "embedding" else "fits all networks"
    work = job.training(learned).method.work(len(families))
    training = f"; then {job.minutes:g} minutes of NES, {work} at a time" if job.minutes else ""
    return (
        f"task {job.task}: {sizes}\n"
        f"optimizer: L3RS of {', '.join(learned.base)}; it {apart}\n"
        f"search: {job.points} points{training}"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _searched(
    job: SpecialiseJob, learned: L3RS, families: list[TaskFamily], console: Console
) -> exports.Exported:
    """The result of the search; that of an earlier part of this job, if there is one."""
    names = ("task", "num_steps", "min_steps", "points", "seed")
    identity = {name: getattr(job, name) for name in names}
    # The folder L3RS holds a run of meta-training, or without minutes the result of a search.
    other = job.out / "L3RS" / (exports.SPEC if job.minutes else CONFIG)
    if other.exists():
        raise ValueError(
            f"{other.parent} is of a job {'without' if job.minutes else 'with'} meta-training "
            f"(minutes {'0' if job.minutes else 'above 0'}); choose another folder."
        )
    if not job.overwrite and (job.start / exports.SPEC).exists():
        export = exports.load(job.start)
        known = export.trained.get("search", {})
        if export.settings == learned and {k: known.get(k) for k in identity} == identity:
            return export
        raise ValueError(
            f"{job.start} holds the search of another job; choose another folder, or run it again "
            "with --overwrite True."
        )
    started = time.perf_counter()
    lopt, (k_theta, k_search) = learned.build(), jax.random.split(jax.random.key(job.seed))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _params(families[0]))
    mesh = job.training(learned).method.mesh()
    validate = meta.validation(
        lopt, families, job.lengths, on="anytime", each=True, runs=job.runs, mesh=mesh
    )
    validate = devices.replicated(validate, mesh)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("search", total=job.points)
        found = search(
            learned,
            lopt.init(k_theta, params),
            validate,
            k_search,
            points=job.points,
            any_horizon=len(job.lengths) > 1,
            after_each=lambda loss: progress.advance(bar),
        )
    if not math.isfinite(found.loss):
        raise ValueError(
            f"specialise: task {job.task}: none of {len(found.losses)} optimizers had a finite "
            "score, the mean logarithm of held-out losses. If your loss can be negative, add a "
            "constant to it, or use metaopt train with --method.objective final."
        )
    runs = job.runs * len(families) * len(found.losses)
    cost = {
        "inner_steps": float(runs * sum(job.lengths)),
        "seconds": time.perf_counter() - started,
    }
    record = {**identity, "point": found.point, "loss": found.loss}
    exports.save(job.start, learned, found.theta, {"search": record, "cost": cost})
    return exports.load(job.start)


def point_text(point: dict[str, Any]) -> str:
    """The point of a search (`metaopt.meta.Found`) in words."""
    if not point:
        return "no base optimizer is better than the untrained L3RS"
    rate = point["lr"]
    text = (
        ", ".join(f"{name} {value:.2g}" for name, value in rate.items())
        if isinstance(rate, dict)
        else f"{rate:.2g}"
    )
    others = {name: point[name] for name in ("horizon_power", "norm_power") if name in point}
    others |= point.get("constants", {})
    rest = "".join(f", {name} {value:.2g}" for name, value in others.items())
    return f"{point['base']}, {point['schedule']}, learning rate {text}{rest}"
