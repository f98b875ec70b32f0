"""Run a suite and keep records: each curve is written once it is whole, and never run again."""

import dataclasses
import json
import platform
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from metaopt._version import __version__
from metaopt.core.checks import check_known
from metaopt.core.processes import in_processes
from metaopt.evaluation import contenders
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.comparing import Settings, compare, task_id
from metaopt.evaluation.contenders import Contender, Learned
from metaopt.evaluation.records import FORMAT, INDEX, read_json, write_json
from metaopt.evaluation.suites import SUITES, SuiteTask, fitted
from metaopt.jobs.settings import EvaluateJob, names
from metaopt.meta.loop import METRICS, training_curves
from metaopt.zoo import exports

RUN_ONLY = ("out", "overwrite", "workers")  # what a resumed evaluation may change


def evaluate_suite(job: EvaluateJob) -> Path:
    """Runs an `EvaluateJob` and returns the folder of its records.

    The tasks of the suite are shared by `job.workers` processes.
    """
    loaded = load_all(job)
    for name in names(job.guards):
        check_known("guard", name, contenders.GUARDS)
    identity = {k: v for k, v in dataclasses.asdict(job).items() if k not in RUN_ONLY}
    identity |= {"weights": {name: export.sha256 for name, export in loaded.items()}}
    tasks = [task_id(number, task) for number, task in enumerate(suite_tasks(job))]
    index = {"format": FORMAT, "job": json.loads(json.dumps(identity, default=str))}
    index |= {"tasks": tasks}
    if job.overwrite and job.out.exists():
        shutil.rmtree(job.out)
    if (job.out / INDEX).exists():
        there = read_json(job.out / INDEX)
        if {key: there.get(key) for key in index} != index:
            raise ValueError(
                f"{job.out} holds records of another evaluation; choose another folder, or run "
                "it again with --overwrite True."
            )
    index |= {"environment": environment(_command(job)), "training": _meta_training(job, loaded)}
    write_json(job.out / INDEX, index)
    in_processes(_evaluate_task, [(job, number) for number in range(len(tasks))], job.workers)
    return job.out


def suite_tasks(job: EvaluateJob) -> list[SuiteTask]:
    """The tasks of the job's suite, with the job's number of steps if it has one."""
    return [fitted(task, job.num_steps, job.window) for task in SUITES[job.suite].tasks]


def load_all(job: EvaluateJob) -> dict[str, exports.Exported]:
    """Exports by the names of their folders, which must differ."""
    loaded = {contenders.folder_name(path): exports.load(path) for path in job.checkpoints}
    if len(loaded) < len(job.checkpoints):
        raise ValueError(
            f"checkpoints must have different folder names, got {list(job.checkpoints)}."
        )
    return loaded


def _evaluate_task(job: EvaluateJob, number: int) -> None:
    """All contenders on one task of the suite; the task's folder holds its record and curves."""
    task = suite_tasks(job)[number]
    compare(
        job.out / task_id(number, task),
        task,
        names(job.baselines),
        lambda makes: _contenders(job, makes),
        Settings(job.seeds or 1, job.tuning_seeds, job.window),
    )


def _contenders(job: EvaluateJob, makes: Mapping[str, contenders.Make]) -> list[Contender]:
    """Tuned baselines, checkpoints, guarded checkpoints, guarded adversaries, in this order."""
    found = [contenders.baseline(BASELINES[name].label, make) for name, make in makes.items()]
    guards = names(job.guards)
    exports = [contenders.from_export(name, export) for name, export in load_all(job).items()]
    adversaries = [contenders.adversary(name) for name in SUITES[job.suite].adversaries]

    def guarded(learned: Learned, guard: str) -> Contender:
        fallback = str(job.fallback)
        label = BASELINES[fallback].label
        return contenders.guarded(learned, guard, label, makes[fallback], job.window)

    for learned in exports:
        found += [contenders.plain(learned), *(guarded(learned, guard) for guard in guards)]
    for learned in adversaries:
        found += [guarded(learned, guard) for guard in guards]
    return found


def environment(command: str) -> dict[str, str]:
    """What records were made with; `command` makes them again."""
    device = jax.devices()[0]
    return {
        "metaopt": __version__,
        "jax": jax.__version__,
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "python": platform.python_version(),
        "command": command,
    }


def _command(job: EvaluateJob) -> str:
    words = ["metaopt", "evaluate", *map(str, job.checkpoints)]
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name not in ("checkpoints", "overwrite") and value is not None:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _meta_training(job: EvaluateJob, loaded: dict[str, exports.Exported]) -> dict[str, Any]:
    """Metrics of every checkpoint that is a run folder, and of the run it started from."""
    found = {}
    for path, (name, export) in zip(job.checkpoints, loaded.items(), strict=True):
        run = path.parent if path.name == "export" else path
        start = Path(export.trained.get("warm_start") or "/")
        for label, source in ((f"{name}: warm start", start), (name, run)):
            if (source / METRICS).exists():
                found[label] = training_curves(source)
    return found
