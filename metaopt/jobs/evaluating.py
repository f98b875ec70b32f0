"""Run a suite and keep records: each curve is written once it is whole, and never run again."""

import dataclasses
import json
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from metaopt import __version__, catalog, checkpoints, contenders, datasets, statistics
from metaopt.base import Key, TaskFamily
from metaopt.baselines import BASELINES, chosen, tune_cached
from metaopt.config import EvaluateJob, names
from metaopt.contenders import Contender, Learned
from metaopt.evaluation import begin, evaluate
from metaopt.files import cache_folder
from metaopt.jobs.processes import in_processes
from metaopt.names import known
from metaopt.records import (
    ALL,
    FORMAT,
    INDEX,
    CurveRecord,
    Curves,
    TaskRecord,
    read_json,
    read_record,
    write_arrays,
    write_json,
    write_record,
)
from metaopt.suites import SUITES, SuiteTask
from metaopt.training import METRICS, read_metrics
from metaopt.trees import leaf_names

RUN_ONLY = ("out", "overwrite", "workers")  # what a resumed evaluation may change
VELODROME = Path("velodrome") / "speedup_over_multiple_baselines.json"
TUNING_MEASUREMENTS = 20  # per run of a grid, at most


def evaluate_suite(job: EvaluateJob) -> Path:
    """Runs an `EvaluateJob` and returns the folder of its records.

    The tasks of the suite are shared by `job.workers` processes.
    """
    loaded = load_all(job)
    for name in names(job.guards):
        known("guard", name, contenders.GUARDS)
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
    index |= {"environment": _environment(job), "training": _meta_training(job, loaded)}
    write_json(job.out / INDEX, index)
    in_processes(_evaluate_task, [(job, number) for number in range(len(tasks))], job.workers)
    return job.out


def suite_tasks(job: EvaluateJob) -> list[SuiteTask]:
    """The tasks of the job's suite, with the job's number of steps if it has one."""
    tasks = SUITES[job.suite].tasks
    if job.num_steps is None:
        return list(tasks)
    return [task._replace(num_steps=job.num_steps) for task in tasks]


def task_id(number: int, task: SuiteTask) -> str:
    """The name of the folder that holds the records of a suite's task."""
    return f"{number:02d}-{task.task}-{task.num_steps}"


def load_all(job: EvaluateJob) -> dict[str, checkpoints.Exported]:
    """Exports by the names of their folders, which must differ."""
    loaded = {contenders.folder_name(path): checkpoints.load(path) for path in job.checkpoints}
    if len(loaded) < len(job.checkpoints):
        raise ValueError(
            f"checkpoints must have different folder names, got {list(job.checkpoints)}."
        )
    return loaded


def _evaluate_task(job: EvaluateJob, number: int) -> None:
    """All contenders on one task of the suite; the task's folder holds its record and curves."""
    suite_task = suite_tasks(job)[number]
    folder = job.out / task_id(number, suite_task)
    record = read_record(folder) or TaskRecord(
        *(suite_task.title, suite_task.task, suite_task.num_steps, job.window),
        *({}, {}, {}, {}),
    )
    if missing := catalog.missing_data(suite_task.task):
        record.left_out[ALL] = _not_prepared(missing)
        write_record(folder, record)
        return
    record.left_out.pop(ALL, None)
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    k_eval, k_tune = jax.random.split(jax.random.key(2**31 - 1))
    family = catalog.family(suite_task.task)  # one object: what JAX compiled of it is used again
    makes = _tuned(job, suite_task, family, folder, record, k_tune)
    keys = jax.random.split(k_eval, job.seeds or 1)
    for contender in _contenders(job, makes):
        if contender.name in record.curves or contender.name in record.left_out:
            continue
        console.print(f"[dim]{suite_task.title}:[/] {contender.name}")
        try:
            curves = evaluate(
                contender.make,
                family,
                num_steps=suite_task.num_steps,
                keys=keys,
                window=job.window,
                measure_every=suite_task.measure_every,
                guard=contender.guard,
                diagnostics=contender.fields,
                measure_train=bool(suite_task.velodrome),
            )
        except ValueError as error:  # e.g. L3RS embeddings of another network
            record.left_out[contender.name] = str(error)
        else:
            file = f"{slug(contender.name)}.npz"
            write_arrays(folder / file, curves)
            record.curves[contender.name] = _entry(contender, file, family)
            _compare_with_velodrome(record, suite_task.velodrome, contender.name, curves)
        write_record(folder, record)


def _tuned(
    job: EvaluateJob,
    suite_task: SuiteTask,
    family: TaskFamily,
    folder: Path,
    record: TaskRecord,
    key: Key,
) -> dict[str, contenders.Make]:
    """Baseline's name -> its best point of the grid; the searches go into the record."""
    makes: dict[str, contenders.Make] = {}
    head = catalog.TASKS[suite_task.task].head
    windows = suite_task.num_steps // job.window
    every = min(
        n for n in range(1, windows + 1) if windows % n == 0 and windows // n <= TUNING_MEASUREMENTS
    )
    for name in names(job.baselines):
        baseline = BASELINES[name]
        if baseline.label not in record.tuned:
            found, grid = tune_cached(
                cache_folder() / "baselines",
                suite_task.task,
                baseline,
                family,
                num_steps=suite_task.num_steps,
                keys=jax.random.split(key, job.tuning_seeds),
                window=job.window,
                measure_every=every,
                head=head,
            )
            file = f"tuning-{name}.npz"
            write_arrays(folder / file, grid)
            record.tuned[baseline.label] = {**found, "file": file}
            write_record(folder, record)
        makes[name] = chosen(baseline, record.tuned[baseline.label]["point"], head)
    return makes


def _contenders(job: EvaluateJob, makes: dict[str, contenders.Make]) -> list[Contender]:
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


def _entry(contender: Contender, file: str, family: TaskFamily) -> CurveRecord:
    learned = contender.learned
    bases = learned.bases if learned and contender.kind == "learned" else ()
    layers = ()
    if bases:  # the axes of lambda and alpha
        start = jax.eval_shape(lambda: begin(family, jax.random.split(jax.random.key(0), 1)).params)
        layers = tuple(leaf_names(start))
    return CurveRecord(
        *(file, contender.kind, learned.name if learned else "", contender.guard_name),
        fallback=contender.fallback,
        layers=layers,
        bases=bases,
    )


def _compare_with_velodrome(record: TaskRecord, name: str, contender: str, curves: Curves) -> None:
    """Speed-up against a published curve, where the task has one and the file is there."""
    path = datasets.data_root() / VELODROME
    if not name or not path.exists():
        return
    steps, loss = map(np.asarray, read_json(path)[name])
    own = curves.train_loss.mean(axis=0)
    found = statistics.speedup_against(steps, loss, curves.steps, own)
    record.velodrome["name"] = name
    record.velodrome.setdefault("speedup", {})[contender] = float(found[0])


def _not_prepared(missing: list[str]) -> str:
    commands = ", ".join(datasets.known()[name].command for name in missing)
    return f"not run: {', '.join(missing)} not prepared; give {commands}."


def _environment(job: EvaluateJob) -> dict[str, str]:
    """What the records were made with; `command` repeats the evaluation."""
    device = jax.devices()[0]
    command = ["metaopt", "evaluate", *map(str, job.checkpoints)]
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name not in ("checkpoints", "overwrite") and value is not None:
            command += [f"--{field.name.replace('_', '-')}", str(value)]
    return {
        "metaopt": __version__,
        "jax": jax.__version__,
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "python": platform.python_version(),
        "command": shlex.join(command),
    }


def _meta_training(job: EvaluateJob, loaded: dict[str, checkpoints.Exported]) -> dict[str, Any]:
    """Metrics of every checkpoint that is a run folder, and of the run it started from."""
    found = {}
    for path, (name, export) in zip(job.checkpoints, loaded.items(), strict=True):
        run = path.parent if path.name == "export" else path
        start = Path(export.trained.get("warm_start") or "/")
        for label, source in ((f"{name}: warm start", start), (name, run)):
            if (source / METRICS).exists():
                metrics = read_metrics(source)
                found[label] = {
                    key: np.asarray(metrics[key], float).tolist()
                    for key in ("step", "meta_loss", "validation_loss")
                    if key in metrics
                }
    return found


def slug(name: str) -> str:
    """``"LGL2O(L2O, SGD)"`` -> ``"lgl2o-l2o-sgd"``, a file name anywhere."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
