"""An evaluation's folder -> what its tables say. Reads records only; imports no JAX."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaopt.core.checks import check_file_name, check_json
from metaopt.evaluation.records import (
    ALL,
    RECORD,
    CurveRecord,
    Curves,
    Grid,
    TaskRecord,
    read_curves,
    read_grid,
    read_index,
    read_record,
)
from metaopt.evaluation.statistics import (
    Interval,
    Outcome,
    divergence_rate,
    final_mean,
    iqm_interval,
    loss_ratios,
    mean_interval,
    outcome,
    speedups,
    steps_to_reach,
)

REFERENCE = "Adam"  # what speed-ups are measured against: the tuned baseline of this name
TUNED = {"point": dict, "grid": [dict], "loss": [float], "file": str, "seconds": float}
TUNED |= {"seeds": int, "runs": int, "grad_evals": int}
KINDS = ("baseline", "learned", "guarded")


class TaskData(NamedTuple):
    """A task's record with its arrays; optimizers in the order of `KINDS`."""

    folder: str
    record: TaskRecord
    curves: dict[str, Curves]
    grids: dict[str, Grid]


class Evaluation(NamedTuple):
    """What `load` finds.

    Attributes:
      index: see `records.read_index`.
      tasks: those that have curves.
      refused: folders of tasks that could not be run -> title and reason.
    """

    index: dict[str, Any]
    tasks: list[TaskData]
    refused: dict[str, str]


class Row(NamedTuple):
    """One optimizer on one task.

    Attributes:
      optimizer: its name.
      loss, accuracy: final mean on the test split; accuracy None where the task has none.
      speedup: interquartile mean over seeds of `speedups` against the reference, in optimizer
        steps; None without the reference.
      steps: until the mean loss is at most the reference's final one; inf: never.
      outcome: against the reference's final losses; None for the reference itself.
      diverged: share of seeds.
      velodrome: speed-up against the published curve, if there is one.
    """

    optimizer: str
    loss: Interval
    accuracy: Interval | None
    speedup: Interval | None
    steps: float
    outcome: Outcome | None
    diverged: float
    velodrome: float | None


class Standing(NamedTuple):
    """One optimizer over all tasks it ran on together with the reference.

    Attributes:
      optimizer: its name.
      tasks: their number.
      speedup, speedup_grads: against the reference, in optimizer steps and in gradient
        evaluations; None where every reference run is useless (see `speedups`).
      ratio: final loss over the reference's.
      wins, ties, losses: tasks.
      diverged: share of runs over all tasks it ran on.
    """

    optimizer: str
    tasks: int
    speedup: Interval | None
    speedup_grads: Interval | None
    ratio: Interval | None
    wins: int
    ties: int
    losses: int
    diverged: float


def load(folder: Path) -> Evaluation:
    """Reads an evaluation's folder.

    Raises:
      ValueError: if it is no evaluation, or holds no curve yet.
    """
    index = read_index(folder)
    tasks, refused = [], {}
    for name in index["tasks"]:
        record = read_record(folder / name)
        if record is not None and ALL in record.left_out:
            refused[name] = f"{record.title}: {record.left_out[ALL]}"
        if record is None or not record.curves:
            continue
        entries = sorted(record.curves.items(), key=lambda entry: KINDS.index(entry[1].kind))
        curves = {n: read_curves(folder / name / entry.file) for n, entry in entries}
        grids = {n: _grid(folder / name, n, tuned) for n, tuned in record.tuned.items()}
        tasks.append(TaskData(name, record, curves, grids))
    if not tasks:
        why = " ".join(refused.values()) or "run it again to resume."
        raise ValueError(f"{folder}: the evaluation has no finished task; {why}")
    return Evaluation(index, tasks, refused)


def _grid(folder: Path, name: str, tuned: dict[str, Any]) -> Grid:
    """The curves of a baseline's search, which are those of the points in its record."""
    where = f"{folder / RECORD}: tuned.{name[:80]}"
    check_json(where, tuned, TUNED)
    check_file_name(f"{where}.file", tuned["file"])
    grid = read_grid(folder / tuned["file"])
    numbers = {len(tuned["grid"]), len(tuned["loss"]), len(grid.loss)}
    if len(numbers) > 1:
        raise ValueError(
            f"{folder / tuned['file']}: its loss is of {len(grid.loss)} points, but {RECORD} lists "
            f"{len(tuned['grid'])} in its grid and {len(tuned['loss'])} in its loss."
        )
    return grid


def optimizers(evaluation: Evaluation) -> dict[str, CurveRecord]:
    """Entries over all tasks by name: baselines, learned, guarded."""
    entries = {n: e for task in evaluation.tasks for n, e in task.record.curves.items()}
    return dict(sorted(entries.items(), key=lambda entry: KINDS.index(entry[1].kind)))


def rows(task: TaskData) -> list[Row]:
    """One row per optimizer, the lowest final loss first."""
    made = [_row(task, name) for name in task.curves]
    return sorted(made, key=lambda row: float(row.loss.mean))


def _row(task: TaskData, name: str) -> Row:
    curves, reference = task.curves[name], task.curves.get(REFERENCE)
    accuracy = None
    if not np.isnan(curves.accuracy).all():
        accuracy = mean_interval(final_mean(curves.accuracy))
    speedup, steps, against = None, float("inf"), None
    if reference is not None:
        speedup = _iqm([speedups(reference.steps, reference.loss, curves.steps, curves.loss)])
        mean_loss = np.asarray(curves.loss, np.float64).mean(axis=0)
        steps = steps_to_reach(curves.steps, mean_loss, float(final_mean(reference.loss).mean()))
        against = None if name == REFERENCE else outcome(reference.loss, curves.loss)
    return Row(
        optimizer=name,
        loss=mean_interval(final_mean(curves.loss)),
        accuracy=accuracy,
        speedup=speedup,
        steps=steps,
        outcome=against,
        diverged=divergence_rate(curves.loss),
        velodrome=task.record.velodrome.get("speedup", {}).get(name),
    )


def standings(evaluation: Evaluation) -> list[Standing]:
    """One entry per optimizer, the highest speed-up first; without the reference, none."""
    made = [_standing(evaluation, name) for name in optimizers(evaluation)]
    key = lambda s: -float(s.speedup.mean) if s.speedup else np.inf
    return sorted((s for s in made if s.tasks), key=key)


def _standing(evaluation: Evaluation, name: str) -> Standing:
    pairs = [
        (task.curves[REFERENCE], task.curves[name])
        for task in evaluation.tasks
        if REFERENCE in task.curves and name in task.curves
    ]
    outcomes = [outcome(r.loss, c.loss) for r, c in pairs]
    runs = [t.curves[name].loss for t in evaluation.tasks if name in t.curves]
    return Standing(
        optimizer=name,
        tasks=len(pairs),
        speedup=_iqm([speedups(r.steps, r.loss, c.steps, c.loss) for r, c in pairs]),
        speedup_grads=_iqm(
            [speedups(r.grad_evals, r.loss, c.grad_evals, c.loss) for r, c in pairs]
        ),
        ratio=_iqm([loss_ratios(r.loss, c.loss) for r, c in pairs]),
        wins=outcomes.count("win"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("loss"),
        diverged=float(np.mean([divergence_rate(loss) for loss in runs])),
    )


def _iqm(scores: list[np.ndarray]) -> Interval | None:
    """Over the seeds on which the reference itself got anywhere."""
    kept = [task[~np.isnan(task)] for task in scores]
    kept = [task for task in kept if task.size]
    return iqm_interval(kept) if kept else None


def headline(evaluation: Evaluation, found: list[Standing]) -> tuple[str, str]:
    """(which optimizer wins by how much, what to know about that win), in plain words."""
    rivals = [s for s in found if s.optimizer != REFERENCE and s.speedup]
    if not rivals:
        done = _tasks(len(evaluation.tasks))
        return f"{done} evaluated; nothing was compared with tuned {REFERENCE}.", ""
    rivals = [s for s in rivals if s.tasks == max(r.tasks for r in rivals)]
    best, safe = rivals[0], next((s for s in rivals if not s.diverged), None)
    assert best.speedup is not None  # for the type checker: rivals have one
    mean, interval = factor(best.speedup.mean), f"95% interval {span(best.speedup)}"
    if best.speedup.low > 1:
        first = f"{best.optimizer} is the fastest: it needs {mean} times fewer steps than tuned "
        first += f"{REFERENCE} for the same loss ({interval})"
    elif best.speedup.high < 1:
        first = f"Tuned {REFERENCE} is the fastest; {best.optimizer} comes next, with a speed-up "
        first += f"of {mean} ({interval})"
    else:
        first = f"No optimizer is clearly faster than tuned {REFERENCE}: the best one, "
        first += f"{best.optimizer}, has a speed-up of {mean} ({interval})"
    first += f", but {best.diverged:.0%} of its runs diverged." if best.diverged else "."
    rest = f"By final loss it wins {best.wins}, ties {best.ties} and loses {best.losses} "
    rest += f"of {_tasks(best.tasks)}."
    if best.speedup_grads and abs(best.speedup_grads.mean - best.speedup.mean) > 0.005:
        rest += " Counted in gradient evaluations, its speed-up is "
        rest += f"{factor(best.speedup_grads.mean)} ({span(best.speedup_grads)})."
    if not best.diverged:
        rest += " None of its runs diverged."
    elif safe and safe.speedup:
        rest += f" Of those that never diverged, {safe.optimizer} comes first, with a speed-up "
        rest += f"of {factor(safe.speedup.mean)} ({span(safe.speedup)})."
    return first, rest


def _tasks(number: int) -> str:
    return f"{number} task{'s' * (number > 1)}"


def factor(value: Any) -> str:
    """``1.8``, ``0.043``, ``12``: about two digits of a ratio."""
    value = float(value)
    if not np.isfinite(value):
        return "∞" if value > 0 else "–"
    if value >= 1e4:
        return f"{value:.0e}"
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def span(interval: Interval) -> str:
    """``low–high`` of a ratio, or the value itself where there is no width."""
    low, high = factor(interval.low), factor(interval.high)
    return low if low == high else f"{low}–{high}"
