"""Runs all contenders on one task, from the same params and mini-batches, and records curves."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metaopt import datasets
from metaopt.core.checks import check_json, show
from metaopt.core.files import cache_folder
from metaopt.core.trees import leaf_names
from metaopt.core.types import Key, TaskFamily
from metaopt.evaluation import statistics
from metaopt.evaluation.baselines import chosen, named
from metaopt.evaluation.contenders import Contender
from metaopt.evaluation.curves import Adjustable, begin, evaluate
from metaopt.evaluation.progress import Begin, progress
from metaopt.evaluation.records import (
    ALL,
    RECORD,
    CurveRecord,
    Curves,
    TaskRecord,
    read_json,
    read_record,
    write_arrays,
    write_record,
)
from metaopt.evaluation.suites import SuiteTask
from metaopt.evaluation.tuning import is_reachable, tune_cached
from metaopt.tasks import catalog

VELODROME = Path("velodrome") / "speedup_over_multiple_baselines.json"
TUNING_MEASUREMENTS = 20  # per run of a grid, at most


class ComparisonSettings(NamedTuple):
    """The settings that all contenders of a comparison share.

    Attributes:
      seeds: runs per contender.
      tuning_seeds: runs per point of a baseline's grid.
      window: training mini-batches per window of guards, and validation ones where they take them.
    """

    seeds: int
    tuning_seeds: int = 3
    window: int = 10


class _Place(NamedTuple):
    """A task with the folder and the record that contenders are written to.

    Attributes:
      folder: folder of the task's record and curves.
      suite_task: the task of the suite.
      settings: see `ComparisonSettings`.
      family: the family of tasks that is run.
      record: the task's record so far.
    """

    folder: Path
    suite_task: SuiteTask
    settings: ComparisonSettings
    family: TaskFamily
    record: TaskRecord

    def save(self) -> None:
        write_record(self.folder, self.record)


def task_id(number: int, task: SuiteTask) -> str:
    """Name of the folder with the records of a suite's task."""
    name = re.sub(r"[^\w.-]+", "-", task.task)  # of a user's task, package.module:function
    return f"{number:02d}-{name}-{task.num_steps}"


def compare(
    folder: Path,
    suite_task: SuiteTask,
    baselines: Sequence[str],
    contenders_of: Callable[[dict[str, Adjustable]], Sequence[Contender]],
    settings: ComparisonSettings,
) -> None:
    """Tunes the baselines and runs the contenders that have no curves in `folder` yet.

    Args:
      folder: folder of the task's record and curves.
      suite_task: the task.
      baselines: names, see `metaopt.evaluation.baselines.named`.
      contenders_of: ``{name of a baseline: tuned baseline} -> contenders``, in the order of tables.
      settings: see `ComparisonSettings`.
    """
    record = read_record(folder) or TaskRecord(
        title=suite_task.title,
        task=suite_task.task,
        num_steps=suite_task.num_steps,
        window=settings.window,
        tuned={},
        curves={},
        left_out={},
        velodrome={},
    )
    if missing := catalog.missing_data(suite_task.task):
        if not record.curves:  # curves from a machine that has the data are kept
            record.left_out[ALL] = _not_prepared(missing)
            write_record(folder, record)
        return
    record.left_out.pop(ALL, None)
    family = catalog.family(suite_task.task)
    place = _Place(folder, suite_task, settings, family, record)
    k_eval, k_tune = jax.random.split(jax.random.key(2**31 - 1))
    with progress(suite_task.title, suite_task.num_steps // settings.window) as begin_progress:
        makes = _tune_all(place, baselines, k_tune, begin_progress)
        recorded = record.curves.keys() | record.left_out.keys()
        missing = [c for c in contenders_of(makes) if c.name not in recorded]
        for index, contender in enumerate(missing):
            tick = begin_progress(contender.name, len(missing) - index)
            _run(place, contender, k_eval, tick)


def _run(place: _Place, contender: Contender, key: Key, tick: Callable[[int], None]) -> None:
    """Runs a contender and records its curves, or the reason why it cannot be run."""
    suite_task, record = place.suite_task, place.record
    try:
        curves = evaluate(
            contender.make,
            place.family,
            num_steps=suite_task.num_steps,
            keys=jax.random.split(key, place.settings.seeds),
            window=place.settings.window,
            measure_every=suite_task.measure_every,
            diagnostics=contender.fields,
            measure_train=bool(suite_task.velodrome),
            eval_params=contender.eval_params,
            held_out=contender.held_out,
            progress=tick,
        )
    except ValueError as error:  # e.g. L3RS embeddings of another network
        record.left_out[contender.name] = str(error)
    else:
        file = f"{slug(contender.name)}.npz"
        write_arrays(place.folder / file, curves)
        record.curves[contender.name] = _entry(contender, file, place.family)
        _compare_with_velodrome(record, suite_task.velodrome, contender.name, curves)
    place.save()


def _tune_all(
    place: _Place, baselines: Sequence[str], key: Key, begin_progress: Begin
) -> dict[str, Adjustable]:
    """Tunes the baselines and records the searches; name of a baseline -> tuned baseline."""
    makes: dict[str, Adjustable] = {}
    task, settings, tuned = place.suite_task, place.settings, place.record.tuned
    head = catalog.head(task.task)
    windows = task.num_steps // settings.window
    every = min(
        n for n in range(1, windows + 1) if windows % n == 0 and windows // n <= TUNING_MEASUREMENTS
    )
    left = [name for name in baselines if named(name).label not in tuned]
    for name in baselines:
        baseline = named(name)
        if name in left:
            title = f"grid search of {baseline.label}"
            search, grid = tune_cached(
                folder=cache_folder() / "baselines",
                task_name=task.task,
                baseline=baseline,
                task=place.family,
                num_steps=task.num_steps,
                keys=jax.random.split(key, settings.tuning_seeds),
                window=settings.window,
                measure_every=every,
                head=head,
                progress=begin_progress(title, len(left) - left.index(name)),
            )
            file = f"tuning-{slug(name)}.npz"
            write_arrays(place.folder / file, grid)
            tuned[baseline.label] = {**search, "file": file}
            place.save()
        point: Any = tuned[baseline.label].get("point")
        if not is_reachable(baseline, point, place.family):
            raise ValueError(
                f"{place.folder / RECORD}: the point {show(point)} of {baseline.label} is not in "
                "its grid; run the evaluation again with --overwrite True."
            )
        makes[name] = chosen(baseline, point, head)
    return makes


def _entry(contender: Contender, file: str, family: TaskFamily) -> CurveRecord:
    """The entry of a contender in the task's record."""
    learned = contender.learned
    bases = learned.bases if learned and contender.kind == "learned" else ()
    layers = ()
    if bases:  # names along the axes of lambda and alpha
        start = jax.eval_shape(lambda: begin(family, jax.random.split(jax.random.key(0), 1)).params)
        layers = tuple(leaf_names(start))
    return CurveRecord(
        file=file,
        kind=contender.kind,
        learned=learned.name if learned else "",
        guard=contender.guard_name,
        fallback=contender.fallback,
        layers=layers,
        bases=bases,
    )


def _compare_with_velodrome(record: TaskRecord, name: str, contender: str, curves: Curves) -> None:
    """Records the speed-up over the published curve, if the task has one and its file exists."""
    path = datasets.data_root() / VELODROME
    if not name or not path.exists():
        return
    reference = read_json(path)
    check_json(str(path), reference, {name: [[float]]})
    steps, loss = map(np.asarray, reference[name])
    own = curves.train_loss.mean(axis=0)
    speedup = statistics.speedup_against(steps, loss, curves.steps, own)
    record.velodrome["name"] = name
    record.velodrome.setdefault("speedup", {})[contender] = speedup.factor


def _not_prepared(missing: list[str]) -> str:
    commands = ", ".join(datasets.specs()[name].command for name in missing)
    return f"not run: {', '.join(missing)} not prepared; give {commands}."


def slug(name: str) -> str:
    """A file name for any operating system: ``"LGL2O(L2O, SGD)"`` -> ``"lgl2o-l2o-sgd"``."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
