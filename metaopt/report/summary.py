"""Summary of an evaluation: its records as rows, standings and one sentence. Imports no JAX."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

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

REFERENCE = "Adam"  # label of the tuned baseline that speed-ups are measured against
KINDS = ("baseline", "learned", "guarded")
# JSON schema of a grid search, for `check_json`.
_TUNED = {
    "point": dict,
    "grid": [dict],
    "loss": [float],
    "file": str,
    "seconds": float,
    "seeds": int,
    "runs": int,
    "grad_evals": int,
    "extended": int,
    "edge": str,
}
_OLDER: dict[str, Any] = {"extended": 0, "edge": ""}  # of records that lack these


class TaskData(NamedTuple):
    """A task's record with its arrays.

    Attributes:
      folder: name of the task's folder.
      record: the record.
      curves: name of an optimizer -> its curves, in the order of `KINDS`.
      grids: label of a baseline -> the curves of its grid search.
    """

    folder: str
    record: TaskRecord
    curves: dict[str, Curves]
    grids: dict[str, Grid]


class Evaluation(NamedTuple):
    """All records of an evaluation.

    Attributes:
      index: see `metaopt.evaluation.records.read_index`.
      tasks: the tasks that have curves.
      refused: folder of a task that could not be run -> its title and the reason.
    """

    index: dict[str, Any]
    tasks: list[TaskData]
    refused: dict[str, str]


class Row(NamedTuple):
    """One optimizer on one task.

    Final values follow `metaopt.evaluation.statistics.final_mean`.

    Attributes:
      optimizer: name of the optimizer.
      loss: final test loss, mean over seeds.
      accuracy: final test accuracy, mean over seeds; None where the task has none.
      speedup: interquartile mean over seeds of `speedups` against the reference, in optimizer
        steps; None without the reference.
      steps: first measured step at which the mean loss is at most the final mean loss of the
        reference; inf if there is none.
      outcome: win, tie or loss against the reference; None for the reference itself.
      diverged: fraction of the seeds that diverged.
      velodrome: speed-up over the published curve, if there is one.
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
    """One optimizer over all tasks on which both it and the reference ran.

    Attributes:
      optimizer: name of the optimizer.
      tasks: number of these tasks.
      speedup: speed-up over the reference, in optimizer steps; None where every run of the
        reference is useless (see `metaopt.evaluation.statistics.speedups`).
      speedup_grads: the same in gradient evaluations.
      ratio: final loss divided by the reference's.
      rival: the `stronger_baseline` of the evaluation, or None.
      over_rival: speed-up over `rival`, in optimizer steps, on the tasks on which both ran; None
        for this baseline itself, and where there is none.
      wins: number of tasks that it wins by final loss.
      ties: number of tasks that are tied.
      losses: number of tasks that it loses.
      diverged: fraction of its runs that diverged, over all tasks on which it ran.
    """

    optimizer: str
    tasks: int
    speedup: Interval | None
    speedup_grads: Interval | None
    ratio: Interval | None
    rival: str | None
    over_rival: Interval | None
    wins: int
    ties: int
    losses: int
    diverged: float


class Mixture(NamedTuple):
    """Steps of one L3RS during its runs on a task, mean over seeds.

    W is the number of windows, L of layers, P of base optimizers.

    Attributes:
      optimizer: name of the optimizer.
      steps: optimizer steps at the end of each window.
      norms: step norm lambda of each layer.
      weights: weight alpha of each base optimizer, per layer.
      layers: names of the layers, or numbers where the record names none.
      bases: names of the base optimizers, or numbers.
    """

    optimizer: str
    steps: Int[np.ndarray, " W"]
    norms: Float[np.ndarray, "W L"]
    weights: Float[np.ndarray, "W L P"]
    layers: list[str]
    bases: list[str]


def load(folder: Path) -> Evaluation:
    """Reads the folder of an evaluation.

    Raises:
      ValueError: when the folder holds no evaluation, or none of its tasks has a curve yet.
    """
    index = read_index(folder)
    tasks, refused = [], {}
    for name in index["tasks"]:
        record = read_record(folder / name)
        if record is not None and ALL in record.left_out:
            refused[name] = f"{record.title}: {record.left_out[ALL]}"
        if record is None or not record.curves:
            continue
        entries = _in_order(record.curves)
        curves = {n: read_curves(folder / name / entry.file) for n, entry in entries.items()}
        grids = {n: _read_grid(folder / name, n, tuned) for n, tuned in record.tuned.items()}
        tasks.append(TaskData(folder=name, record=record, curves=curves, grids=grids))
    if not tasks:
        advice = " ".join(refused.values()) or "run it again to resume."
        raise ValueError(f"{folder}: the evaluation has no finished task; {advice}")
    return Evaluation(index, tasks, refused)


def _read_grid(folder: Path, name: str, tuned: dict[str, Any]) -> Grid:
    """Curves of a baseline's grid search; its points must be those of the record."""
    where = f"{folder / RECORD}: tuned.{name[:80]}"
    check_json(where, _OLDER | tuned, _TUNED)
    check_file_name(f"{where}.file", tuned["file"])
    grid = read_grid(folder / tuned["file"])
    numbers = {len(tuned["grid"]), len(tuned["loss"]), len(grid.loss)}
    if len(numbers) > 1:
        raise ValueError(
            f"{folder / tuned['file']}: its loss has {len(grid.loss)} points, but {RECORD} lists "
            f"{len(tuned['grid'])} points in grid and {len(tuned['loss'])} in loss."
        )
    return grid


def at_edges(evaluation: Evaluation) -> list[str]:
    """The searches whose best learning rate is the lowest or the highest that was tried."""
    return [
        f"{name} on {task.record.title} ({tuned['edge']})"
        for task in evaluation.tasks
        for name, tuned in task.record.tuned.items()
        if tuned.get("edge")
    ]


def optimizers(evaluation: Evaluation) -> dict[str, CurveRecord]:
    """Entries of all optimizers over all tasks, by name, in the order of `KINDS`."""
    return _in_order({n: e for task in evaluation.tasks for n, e in task.record.curves.items()})


def _in_order(entries: dict[str, CurveRecord]) -> dict[str, CurveRecord]:
    return dict(sorted(entries.items(), key=lambda item: KINDS.index(item[1].kind)))


def training_runs(index: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Curves of meta-trainings in an index, as arrays; missing values are NaN."""
    runs = {}
    for name, metrics in index.get("training", {}).items():
        arrays = {key: np.array(values, np.float64) for key, values in metrics.items()}
        if len(arrays.get("step", ())) and np.isfinite(arrays["meta_loss"]).any():
            runs[name] = arrays
    return runs


def mixtures(task: TaskData) -> list[Mixture]:
    """Step norms and weights of every L3RS that ran on the task without a guard."""
    return [
        _mixture(name, curves, task.record.curves[name])
        for name, curves in task.curves.items()
        if {"alpha", "lambda_"} <= set(curves.state)
    ]


def _mixture(name: str, curves: Curves, entry: CurveRecord) -> Mixture:
    norms = np.mean(curves.state["lambda_"], axis=0)
    weights = np.mean(curves.state["alpha"], axis=0)
    layers, bases = list(entry.layers), list(entry.bases)
    if len(layers) != norms.shape[1]:
        layers = [f"layer {i}" for i in range(norms.shape[1])]
    if len(bases) != weights.shape[2]:
        bases = [f"base {i}" for i in range(weights.shape[2])]
    return Mixture(
        optimizer=name,
        steps=curves.windows,
        norms=norms,
        weights=weights,
        layers=layers,
        bases=bases,
    )


def rows(task: TaskData) -> list[Row]:
    """One row per optimizer of a task, the lowest final loss first."""
    unsorted = [_row(task, name) for name in task.curves]
    return sorted(unsorted, key=lambda row: float(row.loss.mean))


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
    """One entry per optimizer, the highest speed-up first; empty without the reference."""
    rival = stronger_baseline(evaluation)
    unsorted = [_standing(evaluation, name, rival) for name in optimizers(evaluation)]
    return sorted(
        (standing for standing in unsorted if standing.tasks),
        key=lambda standing: -float(standing.speedup.mean) if standing.speedup else np.inf,
    )


def best_baseline(tasks: list[TaskData]) -> str | None:
    """The tuned baseline with the lowest mean final loss on most tasks, or None."""
    winners = []
    for task in tasks:
        losses = {
            name: float(np.mean(final_mean(curves.loss)))
            for name, curves in task.curves.items()
            if task.record.curves[name].kind == "baseline"
        }
        losses = {name: loss for name, loss in losses.items() if np.isfinite(loss)}
        if losses:
            winners.append(min(losses, key=lambda name: losses[name]))
    return max(dict.fromkeys(winners), key=winners.count) if winners else None


def stronger_baseline(evaluation: Evaluation) -> str | None:
    """The best baseline, if by final loss it wins more tasks than it loses to the reference."""
    best = best_baseline(evaluation.tasks)
    if best is None or best == REFERENCE:
        return None
    pairs = _pairs(evaluation, REFERENCE, best)
    outcomes = [outcome(reference.loss, curves.loss) for reference, curves in pairs]
    return best if outcomes.count("win") > outcomes.count("loss") else None


def _pairs(evaluation: Evaluation, rival: str, name: str) -> list[tuple[Curves, Curves]]:
    """Curves of two optimizers on the tasks on which both ran."""
    return [
        (task.curves[rival], task.curves[name])
        for task in evaluation.tasks
        if rival in task.curves and name in task.curves
    ]


def _standing(evaluation: Evaluation, name: str, rival: str | None) -> Standing:
    pairs = _pairs(evaluation, REFERENCE, name)
    against_rival = []
    if rival not in (None, name):
        against_rival = _pairs(evaluation, rival, name)
    outcomes = [outcome(reference.loss, curves.loss) for reference, curves in pairs]
    losses = [task.curves[name].loss for task in evaluation.tasks if name in task.curves]
    return Standing(
        optimizer=name,
        tasks=len(pairs),
        speedup=_iqm([speedups(r.steps, r.loss, c.steps, c.loss) for r, c in pairs]),
        speedup_grads=_iqm(
            [speedups(r.grad_evals, r.loss, c.grad_evals, c.loss) for r, c in pairs]
        ),
        ratio=_iqm([loss_ratios(r.loss, c.loss) for r, c in pairs]),
        rival=rival,
        over_rival=_iqm([speedups(r.steps, r.loss, c.steps, c.loss) for r, c in against_rival]),
        wins=outcomes.count("win"),
        ties=outcomes.count("tie"),
        losses=outcomes.count("loss"),
        diverged=float(np.mean([divergence_rate(loss) for loss in losses])),
    )


def _iqm(scores: list[np.ndarray]) -> Interval | None:
    """`iqm_interval` over the scores that are not NaN, or None if there are none."""
    kept = [task[~np.isnan(task)] for task in scores]
    kept = [task for task in kept if task.size]
    return iqm_interval(kept) if kept else None


def headline(evaluation: Evaluation, ranking: list[Standing]) -> tuple[str, str]:
    """The result in plain words.

    Args:
      evaluation: the evaluation.
      ranking: its `standings`.

    Returns:
      A sentence that names the fastest optimizer and its speed-up, and the details (final losses,
      gradient evaluations, divergence), which may be empty.
    """
    rivals = [s for s in ranking if s.optimizer != REFERENCE and s.speedup]
    if not rivals:
        number = _count_tasks(len(evaluation.tasks))
        return f"{number} evaluated; nothing was compared with tuned {REFERENCE}.", ""
    rivals = [s for s in rivals if s.tasks == max(rival.tasks for rival in rivals)]
    best, safe = rivals[0], next((s for s in rivals if not s.diverged), None)
    assert best.speedup is not None  # for the type checker; rivals have a speed-up
    mean, interval = factor(best.speedup.mean), f"95% interval {span(best.speedup)}"
    if best.speedup.low > 1:
        is_level = best.over_rival is not None and best.over_rival.low <= 1
        title = "" if is_level else " is the fastest: it"
        first = (
            f"{best.optimizer}{title} needs {mean} times fewer steps than tuned {REFERENCE} for "
            f"the same loss ({interval})"
        )
        if best.over_rival is not None:
            first += _beside_the_rival(str(best.rival), best.over_rival)
    elif best.speedup.high < 1:
        first = (
            f"Tuned {REFERENCE} is the fastest; {best.optimizer} comes next, with a speed-up of "
            f"{mean} ({interval})"
        )
    else:
        first = (
            f"No optimizer is clearly faster than tuned {REFERENCE}: the best one, "
            f"{best.optimizer}, has a speed-up of {mean} ({interval})"
        )
    first += f", but {best.diverged:.0%} of its runs diverged." if best.diverged else "."
    details = [f"By final loss it {_outcomes_text(best.wins, best.ties, best.losses)}."]
    if best.over_rival is not None:
        pairs = _pairs(evaluation, str(best.rival), best.optimizer)
        outcomes = [outcome(rival.loss, curves.loss) for rival, curves in pairs]
        counts = (outcomes.count(kind) for kind in ("win", "tie", "loss"))
        details.append(f"Against {best.rival} it {_outcomes_text(*counts)}.")
    if best.speedup_grads and abs(best.speedup_grads.mean - best.speedup.mean) > 0.005:
        details.append(
            f"Counted in gradient evaluations, its speed-up is {factor(best.speedup_grads.mean)} "
            f"({span(best.speedup_grads)})."
        )
    if not best.diverged:
        details.append("None of its runs diverged.")
    elif safe and safe.speedup:
        details.append(
            f"Among the optimizers that never diverged, {safe.optimizer} is the fastest, with a "
            f"speed-up of {factor(safe.speedup.mean)} ({span(safe.speedup)})."
        )
    return first, " ".join(details)


def _beside_the_rival(baseline: str, speedup: Interval) -> str:
    """How an optimizer that beats the reference stands beside a better baseline."""
    mean, interval = factor(speedup.mean), span(speedup)
    if speedup.low > 1:
        return f", and {mean} times fewer than tuned {baseline}, the best baseline ({interval})"
    if speedup.high < 1:
        return f", but tuned {baseline} is faster: the speed-up over it is {mean} ({interval})"
    return f", and is level with tuned {baseline}: the speed-up over it is {mean} ({interval})"


def _outcomes_text(wins: int, ties: int, losses: int) -> str:
    return f"wins {wins}, ties {ties} and loses {losses} of {_count_tasks(wins + ties + losses)}"


def _count_tasks(number: int) -> str:
    return "1 task" if number == 1 else f"{number} tasks"


def factor(value: Any) -> str:
    """A ratio with about two digits: ``1.83``, ``0.043``, ``12``."""
    value = float(value)
    if not np.isfinite(value):
        return "∞" if value > 0 else "–"
    if value >= 1e4:
        return f"{value:.0e}"
    if value >= 10:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def span(interval: Interval) -> str:
    """The ends of a ratio's interval, ``low–high``, or one value if it has no width."""
    low, high = factor(interval.low), factor(interval.high)
    return low if low == high else f"{low}–{high}"
