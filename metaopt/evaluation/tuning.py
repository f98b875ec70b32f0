"""The cached search for the best point of a baseline: a grid, its extensions, random draws.

A search runs in rounds of points. The first one is the grid. Where the best point so far has the
lowest or the highest learning rate of all, the next round is the points at this rate again, at a
rate beyond it; at most `EXTENSIONS` times, and never for the grid of a paper. The last round of a
baseline with `draws` are random points around the best one.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax

from metaopt._version import __version__
from metaopt.core.files import read_sealed, write_sealed
from metaopt.core.types import Keys, Task, TaskFamily, single
from metaopt.evaluation.baselines import Baseline, Point, chosen, groups_of
from metaopt.evaluation.curves import Recorder, Starts, begin, run, start_losses
from metaopt.evaluation.records import Grid, npz, parse_grid

EXTENSIONS = 3
SPREAD = 1.0  # standard deviation of the change of a log learning rate
SEED = 0  # of the draws, the same for all tasks
DIGITS = 6  # of rates beyond the grid and of drawn ones, which records state in full

Edge = Literal["lowest", "highest"]
RunRound = Callable[[Sequence[Point]], Grid]


class Settings(NamedTuple):
    """What the runs of a search share.

    Attributes:
      num_steps: optimizer steps per run.
      window: optimizer steps per window.
      measure_every: windows between two measurements.
      head: name of the read-out layer in the params, for a baseline that trains only this layer.
    """

    num_steps: int
    window: int = 10
    measure_every: int = 1
    head: str = ""


def tune(
    baseline: Baseline,
    task: Task | TaskFamily,
    *,
    keys: Keys,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Grid]:
    """Search on the "valid" split.

    The point with the lowest loss after the last step wins, as a mean over the seeds. This is the
    one place where a single last measurement counts instead of
    `metaopt.evaluation.statistics.final_mean`: the committed records were tuned with this rule.
    With the other one, 10 of their 161 searches choose another point (docs/results).

    All points of a grid and of its extensions run in one compiled program, and all draws in
    another: a point is a table of learning rates, or one for each group, and numbers.

    Args:
      baseline: the baseline and its grid.
      task: a task, or a family of tasks.
      keys: one PRNG key per seed.
      progress: called with the number of windows done, after each window of a round.
      **settings: fields of `Settings`.

    Returns:
      A record of the search as plain JSON data (see `metaopt.evaluation.records.TaskRecord`), in
      which inf stands for a point that diverged, and the curves of all runs.
    """
    of_all = Settings(**settings)
    run_round = partial(_run_round, baseline, begin(task, keys), of_all, progress)
    return _search(baseline, task, of_all, run_round)


def tune_cached(
    folder: Path,
    task_name: str,
    baseline: Baseline,
    task: Task | TaskFamily,
    *,
    keys: Keys,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Grid]:
    """`tune`, in which rounds that have been run are read from a cache.

    A cached round belongs to the same task if the task's name and the losses before the first step
    agree. A round on data or on a network that has changed since is therefore not reused. Nor is
    one whose file is damaged: the file has a checksum, and holds nothing but the curves. Baselines
    of the same optimizer share their rounds.

    Args:
      folder: folder of the cache.
      task_name: name of the task.
      baseline: see `tune`.
      task: see `tune`.
      keys: see `tune`.
      progress: see `tune`.
      **settings: see `tune`.

    Returns:
      See `tune`.
    """
    of_all, starts = Settings(**settings), begin(task, keys)
    first = start_losses(starts, "valid")

    def run_round(points: Sequence[Point]) -> Grid:
        identity = {
            "metaopt": __version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "device": jax.devices()[0].device_kind,
            "task": task_name,
            "grid": [dict(point) for point in points],
            "baseline": _identity(baseline),
            "keys": np.asarray(jax.random.key_data(keys)).tolist(),
            "settings": of_all._asdict(),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        file, shape = folder / f"{digest}.grid", (len(points), len(keys))
        if payload := read_sealed(file):
            grid = parse_grid(file, payload)
            if grid.loss.shape[:2] == shape and np.allclose(grid.loss[0, :, 0], first, rtol=1e-4):
                return grid
        grid = _run_round(baseline, starts, of_all, progress, points)
        write_sealed(file, npz(grid))
        return grid

    return _search(baseline, task, of_all, run_round)


def _identity(baseline: Baseline) -> list[Any]:
    """What tells the optimizers of two baselines apart: functions by name, lambdas by label."""

    def name(function: Any) -> str:
        if not hasattr(function, "__qualname__") or "<" in function.__qualname__:
            return baseline.label
        return f"{function.__module__}.{function.__qualname__}"

    judged_at = baseline.eval_params and name(baseline.eval_params)
    return [name(baseline.make), judged_at, baseline.head_only]


def _run_round(
    baseline: Baseline,
    starts: Starts,
    settings: Settings,
    progress: Callable[[int], None] | None,
    points: Sequence[Point],
) -> Grid:
    """Runs all points from all starts."""
    tunable = [chosen(baseline, point, settings.head) for point in points]
    started = time.perf_counter()
    curves = run(
        tunable[0].make,
        [point.arrays(settings.num_steps) for point in tunable],
        starts,
        Recorder("valid", settings.measure_every),
        num_steps=settings.num_steps,
        window=settings.window,
        eval_params=baseline.eval_params,
        progress=progress,
    )
    loss = curves.loss.reshape(len(points), len(starts.keys), -1)
    return Grid(curves.steps, loss, np.asarray(time.perf_counter() - started))


def _search(
    baseline: Baseline, task: Task | TaskFamily, settings: Settings, run_round: RunRound
) -> tuple[dict[str, Any], Grid]:
    """All rounds of a search: its record, and the curves of all runs."""
    points = list(baseline.grid)
    grid = run_round(points)
    extended = 0
    while edge := _edge(points, _losses(grid)):
        if not baseline.extends or extended == EXTENSIONS:
            break
        points, grid = _with_round(points, grid, _extension(points, edge), run_round)
        extended += 1
    if baseline.draws:
        best = points[int(np.argmin(_losses(grid)))]
        drawn = _drawn(best, _draws(baseline.draws, group_names(task)))
        points, grid = _with_round(points, grid, drawn, run_round)
    losses = _losses(grid)
    number, seeds, _ = grid.loss.shape
    record = {
        "point": dict(points[int(np.argmin(losses))]),
        "grid": [dict(point) for point in points],
        "extended": extended,
        "edge": edge or "",
        "loss": losses.astype(float).tolist(),
        "seeds": seeds,
        "runs": number * seeds,
        "grad_evals": number * seeds * settings.num_steps,
        "seconds": round(float(grid.seconds), 3),
    }
    return record, grid


def _with_round(
    points: list[Point], grid: Grid, more: Sequence[Point], run_round: RunRound
) -> tuple[list[Point], Grid]:
    """The points and the curves so far, and those of a further round."""
    new = run_round(more)
    loss = np.concatenate([grid.loss, new.loss])
    return [*points, *more], Grid(grid.steps, loss, grid.seconds + new.seconds)


def _losses(grid: Grid) -> np.ndarray:
    """The loss after the last step of each point, mean over the seeds; inf where one diverged."""
    end = grid.loss[..., -1]
    return np.where(np.isfinite(end), end, np.inf).mean(axis=1)


def _edge(points: Sequence[Point], losses: np.ndarray) -> Edge | None:
    """The edge of the learning rates that the best point lies on; None where all diverged."""
    best, rates = int(np.argmin(losses)), _extensible(points)
    if not rates or not np.isfinite(losses[best]):
        return None
    edges: dict[Edge, float] = {"lowest": rates[0], "highest": rates[-1]}
    return next((edge for edge, rate in edges.items() if points[best]["lr"] == rate), None)


def _extension(points: Sequence[Point], edge: Edge) -> tuple[Point, ...]:
    """The points at the lowest or highest learning rate, at the next one beyond it.

    Rates go on as they do at this edge: 0.1, 0.3, 1 by 3, 10. Two rates go on by their ratio.
    """
    rates = _extensible(points)
    last, second, *inner = rates if edge == "lowest" else reversed(rates)
    third = inner[0] if inner else second * second / last
    rate = _rounded(second * last / third)
    return tuple({**point, "lr": rate} for point in points if point["lr"] == last)


def _extensible(points: Sequence[Point]) -> list[float]:
    """The learning rates of the points in order; empty unless they are several and positive."""
    rates = sorted({p["lr"] for p in points if not isinstance(p["lr"], Mapping)})
    return rates if len(rates) > 1 and rates[0] > 0 else []


def _rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")


def group_names(task: Task | TaskFamily) -> tuple[str, ...]:
    """The names of the groups of leaves of the task's params (`groups_of`), sorted."""
    family = task if isinstance(task, TaskFamily) else single(task)
    init = lambda key: family.task(family.sample(key)).init(key)
    params = jax.eval_shape(init, jax.random.key(0))
    return tuple(sorted(set(jax.tree.leaves(groups_of(params)))))


def _draws(number: int, groups: Sequence[str]) -> list[dict[str, float]]:
    """Factors on the learning rate of each group; every other draw changes only some of them."""
    random = np.random.default_rng(SEED)
    draws = []
    for index in range(number):
        logarithms = SPREAD * random.normal(size=len(groups))
        order, changed = random.permutation(len(groups)), 1 + random.integers(len(groups) - 1 or 1)
        if index % 2:
            logarithms[order[changed:]] = 0.0
        draws.append(dict(zip(groups, np.exp(logarithms).tolist(), strict=True)))
    return draws


def _drawn(point: Point, draws: Sequence[Mapping[str, float]]) -> list[Point]:
    """The points of the draws around a point."""
    return [
        {**point, "lr": {name: _rounded(point["lr"] * factor) for name, factor in draw.items()}}
        for draw in draws
    ]


def is_reachable(baseline: Baseline, point: Any, task: Task | TaskFamily) -> bool:
    """Whether a search can end at `point`, which may be any value read from a file.

    Args:
      baseline: the baseline.
      point: the point.
      task: the task that was searched on.
    """
    points = list(baseline.grid)
    if baseline.extends and _extensible(points):
        for edge in get_args(Edge):
            grown = list(baseline.grid)
            for _ in range(EXTENSIONS):
                grown += _extension(grown, edge)
            points += grown[len(baseline.grid) :]
    if point in points:
        return True
    draws = _draws(baseline.draws, group_names(task)) if baseline.draws else []
    return any(point in _drawn(around, draws) for around in points)
