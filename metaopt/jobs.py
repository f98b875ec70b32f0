"""The jobs behind the command line: meta-train and export; evaluate a suite and keep records."""

import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from metaopt import checkpoints, guards, meta
from metaopt.base import LearnedOptimizer, Theta
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
from metaopt.training import train

GUARDS: dict[str, Callable[..., Any]] = {"lgl2o": guards.lgl2o, "race": guards.race}
VALIDATION_RUNS = 16
INDEX = "evaluation.json"


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
        label=f"{job.learned} by {job.method} on {job.task}",
        overwrite=job.overwrite,
    )
    trained = {**_plain(job.identity), "num_steps": list(horizon), "validation_loss": loss}
    return checkpoints.save(job.out / "export", job.learned, job.optimizer_config, theta, trained)


def _validation(lopt: LearnedOptimizer, family, num_steps: int):
    """Mean held-out loss over runs from keys that meta-training never uses."""

    def validate(theta, key):
        run = lambda k: meta.inner_run(lopt, family, theta, k, num_steps=num_steps, eval_batches=8)
        return jnp.mean(jax.vmap(run)(jax.random.split(key, VALIDATION_RUNS))[0])

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
    """Runs an `EvaluateJob`; each curve is written once it is whole, and never run again."""
    loaded = {folder_name(path): checkpoints.load(path) for path in job.checkpoints}
    if len(loaded) < len(job.checkpoints):
        raise ValueError(f"checkpoints must have different folder names, got {job.checkpoints}.")
    for name in names(job.guards):
        known("guard", name, GUARDS)
    identity = _plain({k: v for k, v in dataclasses.asdict(job).items() if k != "overwrite"})
    identity["weights"] = {name: export.sha256 for name, export in loaded.items()}
    job.out.mkdir(parents=True, exist_ok=True)
    index_path = job.out / INDEX
    index: dict[str, Any] = {"job": identity, "tasks": {}}
    if index_path.exists() and not job.overwrite:
        index = json.loads(index_path.read_text())
        if index["job"] != identity:
            raise ValueError(
                f"{job.out} holds records of another evaluation; choose another folder, or run "
                "it again with --overwrite."
            )
    _write_json(index_path, index)
    console = Console(stderr=True, quiet=not sys.stderr.isatty())
    k_eval, k_tune = jax.random.split(jax.random.key(2**31 - 1))
    for number, suite_task in enumerate(SUITES[job.suite]):
        task_id = f"{number}-{suite_task.task}-{suite_task.num_steps}"
        record = index["tasks"].setdefault(
            task_id,
            {
                "title": suite_task.title,
                "num_steps": suite_task.num_steps,
                "tuned": {},
                "curves": {},
                "left_out": {},
            },
        )
        for contender in _contenders(job, suite_task, loaded, record, k_tune):
            file = f"{task_id}/{slug(contender.name)}.npz"
            path = job.out / file
            if not job.overwrite and (path.exists() or contender.name in record["left_out"]):
                record["curves"] |= {contender.name: file} if path.exists() else {}
                continue
            console.print(f"[dim]{suite_task.title}:[/] {contender.name}")
            try:
                curves = evaluate(
                    contender.make,
                    TASKS[suite_task.task](),
                    num_steps=suite_task.num_steps,
                    keys=jax.random.split(k_eval, job.seeds),
                    guard=contender.guard,
                    diagnostics=contender.diagnostics,
                )
            except ValueError as error:  # e.g. L3RS embeddings of another network
                record["left_out"][contender.name] = str(error)
                continue
            write_curves(path, curves)
            record["curves"][contender.name] = file
            _write_json(index_path, index)
        _write_json(index_path, index)
    return job.out


def _contenders(job, suite_task: SuiteTask, loaded, record, key) -> list[Contender]:
    """Tuned baselines, checkpoints, and guarded checkpoints, in this order."""
    contenders, makes = [], {}
    for name in names(job.baselines):
        baseline = BASELINES[name]
        if name in record["tuned"]:
            chosen = record["tuned"][name]
            make = baseline.make[chosen["schedule"]]
            makes[name] = lambda num_steps, make=make, lr=chosen["lr"]: make(lr, num_steps)
        else:
            makes[name], record["tuned"][name] = tune(
                baseline,
                TASKS[suite_task.task](),
                num_steps=suite_task.num_steps,
                keys=jax.random.split(key, job.tuning_seeds),
            )
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
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"state/{name}": value for name, value in curves.state.items()}
    arrays |= {"steps": curves.steps, "loss": curves.loss, "accuracy": curves.accuracy}
    np.savez_compressed(buffer, **arrays)
    part = path.with_suffix(".part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, path)


def read_curves(path: Path) -> Curves:
    """Reads what `write_curves` wrote; pickled data is refused."""
    with np.load(path, allow_pickle=False) as file:
        states = {k.removeprefix("state/"): file[k] for k in file.files if k.startswith("state/")}
        return Curves(file["steps"], file["loss"], file["accuracy"], states)


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)
