"""`metaopt evaluate`: run a suite of tasks and keep records.

A curve is written when it is complete, and is not run again.
"""

import dataclasses
import json
import platform
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from metaopt._version import __version__
from metaopt.core import cpu, memory
from metaopt.core.checks import check_fields, check_known
from metaopt.core.files import check_only_ours, only_writer, remove_contents, sweep_parts
from metaopt.core.processes import in_processes
from metaopt.evaluation import contenders
from metaopt.evaluation.baselines import BASELINES, named
from metaopt.evaluation.comparing import ComparisonSettings, compare, task_id
from metaopt.evaluation.contenders import Contender, Learned
from metaopt.evaluation.records import FORMAT, INDEX, RECORD, read_json, write_json
from metaopt.evaluation.suites import SUITES, Suite, SuiteTask, fitted, suite_of
from metaopt.meta.loop import EXPORT, METRICS, WARM_START, training_curves
from metaopt.tasks import catalog
from metaopt.zoo import exports

# All that an evaluation and its report write in their folder.
OURS = re.compile(
    rf"{INDEX}|report\.html|summary\.md|figures/([\w.-]+\.(png|pdf))?"
    rf"|\d\d+-[\w.-]+/({RECORD}|[\w.-]+\.npz|.*\.\d+\.part)?"
)
ADVICE = (  # where memory does not suffice
    "give fewer --seeds or --tuning-seeds, which run side by side, fewer --workers, or a smaller "
    "task"
)
RUN_ONLY = ("out", "overwrite", "workers")  # what a resumed evaluation may change


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Run checkpoints, guarded checkpoints and tuned baselines on a suite or on tasks of your own.

    Attributes:
      checkpoints: export or run folders; the folder's name is the optimizer's name in tables.
      suite: which tasks; it also sets the defaults of baselines, guards, fallback and seeds. By
        default digits.
      task: instead of a suite, a built-in task or your own as package.module:function (returns a
        metaopt.Task or TaskFamily); several, separated by commas.
      baselines: tuned hand-crafted optimizers, separated by commas; your own as
        package.module:function (takes a learning rate or schedule, returns a transformation).
      guards: guards put around each checkpoint, separated by commas; empty: none.
      fallback: the baseline that guards fall back to.
      seeds: runs per optimizer and task.
      tuning_seeds: runs per point of a baseline's grid.
      num_steps: steps per run, instead of the suite's; with `task`, by default 1000.
      window: training mini-batches per window of guards, and validation ones where they take them.
      workers: processes that share the tasks of the suite.
      out: folder of the records; what is already there is not run again.
      overwrite: run everything again.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    suite: str | None = None
    task: str = ""
    baselines: str | None = None
    guards: str | None = None
    fallback: str | None = None
    seeds: int | None = None
    tuning_seeds: int | None = None
    num_steps: int | None = None
    window: int = 10
    workers: int = 1
    out: Path = Path("runs/evaluation")
    overwrite: bool = False

    def __post_init__(self):
        check_fields(self)
        if self.task and self.suite:
            raise ValueError(
                f"EvaluateJob: give a suite or a task, got suite {self.suite!r} and task "
                f"{self.task!r}."
            )
        if not self.task:
            object.__setattr__(self, "suite", "digits" if self.suite is None else self.suite)
            check_known("suite", str(self.suite), SUITES)
        suite = suite_of_job(self)
        for name in ("baselines", "guards", "fallback", "seeds", "tuning_seeds"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(suite, name))
        for name in _names(self.baselines):
            if ":" not in name:
                check_known("baseline", name, BASELINES)
        if _names(self.guards) and self.fallback not in _names(self.baselines):
            raise ValueError(
                f"EvaluateJob.fallback must be one of the baselines ({self.baselines}), "
                f"got {self.fallback!r}."
            )
        for name in ("seeds", "tuning_seeds", "num_steps", "window", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EvaluateJob.{name} must be at least 1, got {value}.")
        for task in suite.tasks:
            fitted(task, self.num_steps, self.window)


def run(job: EvaluateJob) -> None:
    """Runs an `EvaluateJob`, writes its report and prints its summary."""
    from metaopt import report  # not by the worker processes, which import this module

    report.print_summary(report.report(evaluate_suite(job)))


def evaluate_suite(job: EvaluateJob) -> Path:
    """Runs an `EvaluateJob` and returns the folder of its records.

    `job.workers` processes share the tasks of the suite.
    """
    exported = load_all(job)
    for name in _names(job.guards):
        check_known("guard", name, contenders.GUARDS)
    labels = [named(name).label for name in _names(job.baselines)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"baselines must have different names, got {', '.join(labels)}.")
    for name in _names(job.task):  # an unknown or failing one is told before anything runs
        catalog.build(name)
    settings = {k: v for k, v in dataclasses.asdict(job).items() if k not in RUN_ONLY}
    settings["weights"] = {name: export.sha256 for name, export in exported.items()}
    tasks = [task_id(number, task) for number, task in enumerate(suite_tasks(job))]
    identity = {
        "format": FORMAT,
        "job": json.loads(json.dumps(settings, default=str)),
        "tasks": tasks,
        "guards": "on the stream",  # of mini-batches; older records gave them additional ones
    }
    index = {
        **identity,
        "environment": environment(_command(job)),
        "training": _meta_training(job, exported),
        "training_cost": {name: export.cost for name, export in exported.items() if export.cost},
    }
    job.out.mkdir(parents=True, exist_ok=True)
    with only_writer(job.out):
        _prepare_folder(job.out, identity, job.overwrite)
        write_json(job.out / INDEX, index)
        in_processes(_evaluate_task, [(job, number) for number in range(len(tasks))], job.workers)
    return job.out


def _prepare_folder(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Empties a folder that is overwritten; others must hold the same evaluation, or nothing."""
    if overwrite:
        check_only_ours(folder, OURS, marks=(INDEX,))
        remove_contents(folder)
    elif (folder / INDEX).exists():
        recorded = read_json(folder / INDEX)
        if not isinstance(recorded, dict) or {k: recorded.get(k) for k in identity} != identity:
            raise ValueError(
                f"{folder} holds records of another evaluation; choose another folder, or run "
                "it again with --overwrite True."
            )
    for part in (folder, *(folder / task for task in identity["tasks"])):
        if part.is_dir():
            sweep_parts(part)


def suite_tasks(job: EvaluateJob) -> list[SuiteTask]:
    """The tasks of the job's suite, with the job's number of steps if it has one.

    A task whose data are not prepared has its stand-in's place, if those of the stand-in are.
    """
    fitting = [fitted(task, job.num_steps, job.window) for task in suite_of_job(job).tasks]
    return [_with_stand_in(task) for task in fitting]


def _with_stand_in(task: SuiteTask) -> SuiteTask:
    missing = catalog.missing_data(task.task)
    if not task.stand_in or not missing or catalog.missing_data(task.stand_in):
        return task
    title = f"{task.title}; {task.stand_in} in its place: {', '.join(missing)} not prepared"
    return task._replace(title=title, task=task.stand_in, stand_in="")


def suite_of_job(job: EvaluateJob) -> Suite:
    """The suite that the job names, or that of its tasks."""
    return suite_of(_names(job.task), job.num_steps) if job.task else SUITES[str(job.suite)]


def load_all(job: EvaluateJob) -> dict[str, exports.Exported]:
    """The exports of the job by the names of their folders.

    Raises:
      ValueError: when two folders have the same name.
    """
    exported = {contenders.folder_name(path): exports.load(path) for path in job.checkpoints}
    if len(exported) < len(job.checkpoints):
        raise ValueError(
            f"checkpoints must have different folder names, got {list(job.checkpoints)}."
        )
    return exported


def _names(text: str | None) -> list[str]:
    """``"a, b"`` -> ``["a", "b"]``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _evaluate_task(job: EvaluateJob, number: int) -> None:
    """Runs all contenders on one task of the suite and writes the folder of its records."""
    task = suite_tasks(job)[number]
    with memory.explained(f"task {task.task}", ADVICE):
        compare(
            job.out / task_id(number, task),
            task,
            _names(job.baselines),
            lambda makes: _contenders(job, makes),
            ComparisonSettings(job.seeds or 1, job.tuning_seeds or 1, job.window),
        )


def _contenders(job: EvaluateJob, makes: Mapping[str, contenders.Make]) -> list[Contender]:
    """Tuned baselines, checkpoints, guarded checkpoints, guarded adversaries, in this order."""
    guards, fallback = _names(job.guards), str(job.fallback)

    def guarded(learned: Learned) -> list[Contender]:
        label, make = named(fallback).label, makes[fallback]
        return [contenders.guarded(learned, guard, label, make, job.window) for guard in guards]

    compared = [contenders.baseline(named(name).label, make) for name, make in makes.items()]
    for name, export in load_all(job).items():
        learned = contenders.from_export(name, export)
        compared += [contenders.plain(learned), *guarded(learned)]
    for name in suite_of_job(job).adversaries:
        compared += guarded(contenders.adversary(name))
    return compared


def environment(command: str) -> dict[str, str]:
    """Versions and device that records are made with; `command` makes the records again."""
    device = jax.devices()[0]
    kind = cpu.model() if device.platform == "cpu" else device.device_kind
    return {
        "metaopt": __version__,
        "jax": jax.__version__,
        "device": f"{len(jax.devices())} x {kind} ({device.platform})",
        "python": platform.python_version(),
        "command": command,
    }


def _command(job: EvaluateJob) -> str:
    words = ["metaopt", "evaluate", *map(str, job.checkpoints)]
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name == "task" and not value:  # of a suite; no guards, in contrast, are a setting
            continue
        if field.name not in ("checkpoints", "overwrite") and value is not None:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _meta_training(job: EvaluateJob, exported: dict[str, exports.Exported]) -> dict[str, Any]:
    """Training curves of the checkpoints that are run folders, and of the runs they start from.

    Only files in these folders are read, never those that an export names.
    """
    curves = {}
    for path, name in zip(job.checkpoints, exported, strict=True):
        folder = path.parent if path.name == EXPORT else path
        for label, file in ((f"{name}: warm start", WARM_START), (name, METRICS)):
            if (folder / file).exists():
                curves[label] = training_curves(folder, file)
    return curves
