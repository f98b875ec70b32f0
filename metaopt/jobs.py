"""The jobs behind the command line: meta-train and export; evaluate a suite and keep records."""

import dataclasses
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from metaopt import checkpoints, guards, meta
from metaopt.base import LearnedOptimizer, Task, Theta
from metaopt.config import (
    BASELINES,
    SUITES,
    TASKS,
    EvaluateJob,
    SuiteTask,
    TrainJob,
    known,
    names,
    task_family,
)
from metaopt.evaluation import Curves, evaluate, tune
from metaopt.files import write_whole
from metaopt.training import train

GUARDS: dict[str, Callable[..., Any]] = {"lgl2o": guards.lgl2o, "race": guards.race}
VALIDATION_RUNS = 8
INDEX, RECORD = "evaluation.json", "record.json"
RUN_ONLY = ("out", "overwrite", "workers")  # what a resumed evaluation may change


def meta_train(job: TrainJob) -> Path:
    """Runs a `TrainJob` and returns the folder of the exported optimizer."""
    family = task_family(job.task)
    lopt = checkpoints.build(job.learned, job.optimizer_config, where="--learned")
    k_theta, k_task, k_params = jax.random.split(jax.random.key(job.seed), 3)
    params = family.task(family.sample(k_task)).init(k_params)
    theta = _warm_theta(job, lopt.init(k_theta, params))
    horizon = (job.nes.min_steps, job.nes.max_steps)
    if job.method == "nes":
        trainer = meta.nes(lopt, family, theta, job.nes)
    else:
        trainer, horizon = meta.tbptt(lopt, family, job.tbptt), (job.tbptt.rollout,) * 2
    theta, loss = train(
        trainer,
        theta,
        steps=job.steps,
        seed=job.seed,
        out=job.out,
        config=_plain(job.identity),
        validate=_validation(lopt, family, horizon[1]),
        validate_every=job.validate_every,
        label=f"{job.learned} by {job.method} on {job.task}",
        overwrite=job.overwrite,
    )
    trained = {**_plain(job.identity), "num_steps": list(horizon), "validation_loss": loss}
    return checkpoints.save(job.out / "export", job.learned, job.optimizer_config, theta, trained)


def _validation(lopt: LearnedOptimizer, family, num_steps: int):
    """Mean held-out loss over runs from keys that meta-training never uses."""

    def validate(theta, key):
        runs = meta.starts(family, jax.random.split(key, VALIDATION_RUNS))
        run = lambda s: meta.inner_run(lopt, family, theta, s, num_steps=num_steps, eval_batches=8)
        return jnp.mean(jax.vmap(run)(runs)[0])

    return validate


def _warm_theta(job: TrainJob, fresh: Theta) -> Theta:
    if not job.warm_start:
        return fresh
    given = checkpoints.load(job.warm_start)
    if (given.name, given.config) != (job.learned, job.optimizer_config):
        raise ValueError(
            f"warm_start: {job.warm_start} holds {given.name} {given.config}, but this run trains "
            f"{job.learned} {job.optimizer_config}."
        )
    checkpoints.check_same_structure(f"warm_start: {job.warm_start}", fresh, given.theta)
    return given.theta


def _plain(settings: Any) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


class Contender(NamedTuple):
    """One optimizer of a comparison.

    Attributes: name: in tables; make: ``num_steps -> transformation``; guard: window form;
    diagnostics: fields of its state to record.
    """

    name: str
    make: Callable[[int], Any]
    guard: bool = False
    diagnostics: tuple[str, ...] = ()


def evaluate_suite(job: EvaluateJob) -> Path:
    """Runs an `EvaluateJob`; each curve is written once it is whole, and never run again.

    The tasks of the suite are shared by `job.workers` processes.
    """
    loaded = load_all(job.checkpoints)
    for name in names(job.guards):
        known("guard", name, GUARDS)
    identity = {k: v for k, v in dataclasses.asdict(job).items() if k not in RUN_ONLY}
    identity |= {"weights": {name: export.sha256 for name, export in loaded.items()}}
    index = {
        "job": _plain(identity),
        "tasks": [task_id(number, task) for number, task in enumerate(SUITES[job.suite])],
    }
    if job.overwrite and job.out.exists():
        shutil.rmtree(job.out)
    job.out.mkdir(parents=True, exist_ok=True)
    if (job.out / INDEX).exists() and json.loads((job.out / INDEX).read_text()) != index:
        raise ValueError(
            f"{job.out} holds records of another evaluation; choose another folder, or run "
            "it again with --overwrite."
        )
    _write_json(job.out / INDEX, index)
    in_processes(_evaluate_task, [(job, i) for i in range(len(index["tasks"]))], job.workers)
    return job.out


def _evaluate_task(job: EvaluateJob, number: int) -> None:
    """All contenders on one task of the suite; the task's folder holds its record and curves."""
    suite_task = SUITES[job.suite][number]
    folder = job.out / task_id(number, suite_task)
    record = {"title": suite_task.title, "num_steps": suite_task.num_steps}
    record |= {"tuned": {}, "curves": {}, "left_out": {}}
    if (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text())
    k_eval, k_tune = jax.random.split(jax.random.key(2**31 - 1))
    task = TASKS[suite_task.task]()  # one object: what JAX compiled of it is used again
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    for contender in _contenders(job, task, load_all(job.checkpoints), record, k_tune):
        if contender.name in record["curves"] or contender.name in record["left_out"]:
            continue
        console.print(f"[dim]{suite_task.title}:[/] {contender.name}")
        try:
            curves = evaluate(
                contender.make,
                task,
                num_steps=suite_task.num_steps,
                keys=jax.random.split(k_eval, job.seeds),
                guard=contender.guard,
                diagnostics=contender.diagnostics,
            )
        except ValueError as error:  # e.g. L3RS embeddings of another network
            record["left_out"][contender.name] = str(error)
        else:
            file = f"{slug(contender.name)}.npz"
            write_curves(folder / file, curves)
            record["curves"][contender.name] = file
        _write_json(folder / RECORD, record)


def load_all(paths: Sequence[Path]) -> dict[str, checkpoints.Exported]:
    """Exports by the names of their folders, which must differ."""
    loaded = {folder_name(path): checkpoints.load(path) for path in paths}
    if len(loaded) < len(paths):
        raise ValueError(f"checkpoints must have different folder names, got {list(paths)}.")
    return loaded


def task_id(number: int, task: SuiteTask) -> str:
    """The name of the folder that holds the records of a suite's task."""
    return f"{number}-{task.task}-{task.num_steps}"


def in_processes(fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Makes the calls, in this process or in `workers` others, each on its share of the cores.

    XLA runs programs as small as ours on one core, and processes that share cores wait for each
    other's threads: side by side on cores of their own they are twice as fast as one by one.
    """
    if workers == 1:
        for call in calls:
            fn(*call)
        return
    context = get_context("spawn")
    shares = context.SimpleQueue()
    for worker in range(workers):
        shares.put(worker)
    with ProcessPoolExecutor(workers, context, _take_cores, (shares, workers)) as pool:
        for future in [pool.submit(fn, *call) for call in calls]:
            future.result()


def _take_cores(shares: Any, workers: int) -> None:
    """Keeps a worker to its share of the cores, before JAX counts them."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[shares.get() :: workers] or cores
        os.sched_setaffinity(0, mine)


def _contenders(job: EvaluateJob, task: Task, loaded, record, key) -> list[Contender]:
    """Tuned baselines, checkpoints, and guarded checkpoints, in this order."""
    contenders, makes = [], {}
    for name in names(job.baselines):
        baseline = BASELINES[name]
        if name not in record["tuned"]:
            record["tuned"][name] = tune(
                baseline,
                task,
                num_steps=record["num_steps"],
                keys=jax.random.split(key, job.tuning_seeds),
            )
        found = record["tuned"][name]
        makes[name] = baseline.chosen(found["schedule"], found["lr"])
        contenders.append(Contender(baseline.name, makes[name]))
    for name, export in loaded.items():
        learned = lambda num_steps, export=export: export.apply(num_steps=num_steps)
        diagnostics = ("lambda_", "alpha") if export.name == "l3rs" else ()
        contenders.append(Contender(name, learned, diagnostics=diagnostics))
        for guard_name in names(job.guards):
            guarded = lambda num_steps, guard=GUARDS[guard_name], learned=learned: guard(
                learned(num_steps), makes[job.fallback](num_steps)
            )
            label = f"{guard_name.upper()}({name}, {BASELINES[job.fallback].name})"
            contenders.append(Contender(label, guarded, guard=True, diagnostics=("accepted",)))
    return contenders


def slug(name: str) -> str:
    """``"LGL2O(L2O, SGD)"`` -> ``"lgl2o-l2o-sgd"``, a file name anywhere."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def folder_name(path: Path) -> str:
    """The name of a run in tables: its folder, not the ``export`` inside it."""
    path = Path(path).absolute()
    return path.parent.name if path.name == "export" else path.name


def write_curves(path: Path, curves: Curves) -> None:
    """Writes curves as npz, atomically."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"state/{name}": value for name, value in curves.state.items()}
    arrays |= {"steps": curves.steps, "loss": curves.loss, "accuracy": curves.accuracy}
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def read_curves(path: Path) -> Curves:
    """Reads what `write_curves` wrote; pickled data is refused."""
    with np.load(path, allow_pickle=False) as file:
        states = {k.removeprefix("state/"): file[k] for k in file.files if k.startswith("state/")}
        return Curves(file["steps"], file["loss"], file["accuracy"], states)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1).encode())
