"""Hand-crafted optimizers, the grids they are tuned on, and the cached grid search."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import optimizers
from metaopt._version import __version__
from metaopt.core.checks import check_known
from metaopt.core.files import read_sealed, write_sealed
from metaopt.core.named import load_named
from metaopt.core.types import Keys, Task, TaskFamily
from metaopt.evaluation.curves import Adjustable, Recorder, begin, run, start_losses
from metaopt.evaluation.records import Grid, npz, parse_grid

Point = Mapping[str, Any]  # {"schedule": name, **arguments of the schedule}

# Name -> (num_steps, **arguments) -> schedule of the learning rate.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": lambda num_steps, lr: optax.constant_schedule(lr),
    "cosine": lambda num_steps, lr: optimizers.cosine_decay(lr, num_steps),
    "power": lambda num_steps, lr, tau: optimizers.power_decay(lr, tau),
}


class Baseline(NamedTuple):
    """A hand-crafted optimizer and the grid it is tuned on.

    Attributes:
      label: name in tables.
      make: ``schedule -> transformation``; a schedule maps the step count to a learning rate.
      grid: points of the grid search.
      head_only: whether only the read-out layer is trained (fine-tuning).
    """

    label: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    grid: tuple[Point, ...]
    head_only: bool = False


def named(name: str) -> Baseline:
    """The baseline `name`, or a user's own.

    Args:
      name: a name in `BASELINES`, or ``package.module:attribute`` of a `Baseline` or of a function
        ``schedule -> transformation``, as `optax.adam` is. A function is tuned on Adam's grid.

    Raises:
      ValueError: the name is unknown, or the user's module fails or holds something else.
    """
    if ":" not in name:
        check_known("baseline", name, BASELINES)
        return BASELINES[name]
    made: Any = load_named("baseline", name)
    if isinstance(made, Baseline):
        return made
    if not callable(made):
        raise ValueError(
            f"baseline {name!r} must be a Baseline or a function schedule -> transformation, got "
            f"a {type(made).__name__}."
        )
    make: Any = made
    return Baseline(name.rpartition(":")[2], make, points(_BOTH, lr=_RATES))


def points(schedules: tuple[str, ...], **arguments: tuple[float, ...]) -> tuple[Point, ...]:
    """Product of schedules and their arguments, e.g. ``points(("constant",), lr=(0.1, 0.3))``."""
    product: list[dict[str, Any]] = [{"schedule": schedule} for schedule in schedules]
    for name, values in arguments.items():
        product = [{**point, name: value} for point in product for value in values]
    return tuple(product)


_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_BOTH = ("constant", "cosine")
_LGL2O_TAU = points(("power",), lr=(3.0,), tau=(2e3, 5e3, 1e4, 2e4, 5e4))  # LGL2O, appendix E
# Three of the rates are those of LGL2O for SGD on convolutional networks (appendices D and E). The
# other two lie between them.
_LGL2O_CONVOLUTIONAL = points(("power",), lr=(1e-4, 1e-2, 1e-1, 3e-1, 3.0), tau=(2e4, 5e4))
_CONSTANT = (3e-2, 1e-1, 3e-1, 1.0, 3.0)  # Meta Guard uses 3.0
_LGL2O_ADAM = points(("constant",), lr=(1e-4, 1e-3, 1e-2, 1e-1))
_L3RS_ADAM = points(_BOTH, lr=(1e-5, 1e-4, 1e-3))  # L3RS, section 4

BASELINES: dict[str, Baseline] = {
    "sgd": Baseline("SGD", optax.sgd, points(_BOTH, lr=(0.03, 0.1, 0.3, 0.6, 1.0, 3.0))),
    "momentum": Baseline(
        "Momentum",
        lambda schedule: optax.sgd(schedule, momentum=0.9),
        points(_BOTH, lr=(0.003, 0.01, 0.03, 0.1, 0.3)),
    ),
    "adam": Baseline("Adam", optax.adam, points(_BOTH, lr=_RATES)),
    "adamw": Baseline("AdamW", optax.adamw, points(_BOTH, lr=_RATES)),
    "nadamw": Baseline("NAdamW", optax.nadamw, points(_BOTH, lr=_RATES)),
    "lion": Baseline("Lion", optax.lion, points(_BOTH, lr=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2))),
    "muon": Baseline("Muon", optax.contrib.muon, points(_BOTH, lr=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1))),
    "prodigy": Baseline("Prodigy", optax.contrib.prodigy, points(_BOTH, lr=(0.3, 1.0, 3.0))),
    "sgd-lgl2o": Baseline("SGD (LGL2O's grid)", optax.sgd, _LGL2O_TAU),
    "sgd-lgl2o-cnn": Baseline("SGD (LGL2O's grid, CNN)", optax.sgd, _LGL2O_CONVOLUTIONAL),
    "adam-lgl2o": Baseline("Adam (LGL2O's grid)", optax.adam, _LGL2O_ADAM),
    "sgd-meta-guard": Baseline("SGD (constant)", optax.sgd, points(("constant",), lr=_CONSTANT)),
    "sgd-meta-guard-3": Baseline("SGD at 3", optax.sgd, points(("constant",), lr=(3.0,))),
    "adam-l3rs": Baseline("Adam (L3RS's grid)", optax.adam, _L3RS_ADAM),
    "adam-l3rs-head": Baseline("Adam (head only)", optax.adam, _L3RS_ADAM, head_only=True),
}


def chosen(baseline: Baseline, point: Point, head: str = "") -> Adjustable:
    """The baseline at one point of its grid, ``num_steps -> transformation``.

    Args:
      baseline: the baseline.
      point: the point of its grid.
      head: name of the read-out layer in the params, for a baseline that trains only this layer.
    """
    return Adjustable(
        _transformation(baseline.make, head if baseline.head_only else None),
        lambda num_steps: jnp.asarray(_rates(point, num_steps)),
    )


def tune(
    baseline: Baseline,
    task: Task | TaskFamily,
    *,
    num_steps: int,
    keys: Keys,
    window: int = 10,
    measure_every: int = 1,
    head: str = "",
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], Grid]:
    """Grid search on the "valid" split.

    The point with the lowest loss after the last step wins, as a mean over the seeds. This is the
    one place where a single last measurement counts instead of
    `metaopt.evaluation.statistics.final_mean`: the committed records were tuned with this rule.
    With the other one, 10 of their 161 searches choose another point (docs/results).

    The whole grid runs as one program; a point is a table of learning rates.

    Args:
      baseline: the baseline and its grid.
      task: a task, or a family of tasks.
      num_steps: optimizer steps per run.
      keys: one PRNG key per seed.
      window: optimizer steps per window.
      measure_every: windows between two measurements.
      head: name of the read-out layer in the params, for a baseline that trains only this layer.
      progress: called with the number of windows done, after each window.

    Returns:
      A record of the search as plain JSON data, in which inf stands for a point that diverged, and
      the curves of all runs.
    """
    seeds, number = len(keys), len(baseline.grid)
    tunable = [chosen(baseline, point, head) for point in baseline.grid]
    started = time.perf_counter()
    curves = run(
        tunable[0].make,
        [point.arrays(num_steps) for point in tunable],
        begin(task, keys),
        Recorder("valid", measure_every),
        num_steps=num_steps,
        window=window,
        progress=progress,
    )
    loss = curves.loss.reshape(number, seeds, -1)
    grid = Grid(curves.steps, loss, np.asarray(time.perf_counter() - started))
    return _record(baseline, grid, num_steps), grid


def _record(baseline: Baseline, grid: Grid, num_steps: int) -> dict[str, Any]:
    """The record of a search, from the curves of its runs of `num_steps` steps."""
    number, seeds, _ = grid.loss.shape
    end = grid.loss[..., -1]
    last = np.where(np.isfinite(end), end, np.inf).mean(axis=1)
    return {
        "point": dict(baseline.grid[int(np.argmin(last))]),
        "grid": [dict(point) for point in baseline.grid],
        "loss": last.astype(float).tolist(),
        "seeds": seeds,
        "runs": number * seeds,
        "grad_evals": number * seeds * num_steps,
        "seconds": round(float(grid.seconds), 3),
    }


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
    """`tune`, or its cached result for the same task, grid, keys and settings.

    A cached search belongs to the same task if the task's name and the losses before the first step
    agree. A search on data or on a network that has changed since is therefore not reused. Nor is
    one whose file is damaged: the file has a checksum, and holds nothing but the curves.

    Args:
      folder: folder of the cache.
      task_name: name of the task.
      baseline: see `tune`.
      task: see `tune`.
      keys: see `tune`.
      progress: see `tune`.
      **settings: further arguments of `tune`.

    Returns:
      See `tune`.
    """
    first = start_losses(begin(task, keys), "valid")
    identity = {
        "metaopt": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "task": task_name,
        "grid": [dict(point) for point in baseline.grid],
        "baseline": baseline.label,
        "keys": np.asarray(jax.random.key_data(keys)).tolist(),
        "settings": settings,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    file, shape = folder / f"{digest}.grid", (len(baseline.grid), len(keys))
    if payload := read_sealed(file):
        grid = parse_grid(file, payload)
        if grid.loss.shape[:2] == shape and np.allclose(grid.loss[0, :, 0], first, rtol=1e-4):
            return _record(baseline, grid, settings["num_steps"]), grid
    record, grid = tune(baseline, task, keys=keys, progress=progress, **settings)
    write_sealed(file, npz(grid))
    return record, grid


def _rates(point: Point, num_steps: int) -> np.ndarray:
    """The learning rate of each step, ``[num_steps]``."""
    arguments = {name: value for name, value in point.items() if name != "schedule"}
    schedule = SCHEDULES[point["schedule"]](num_steps, **arguments)
    counts = np.arange(num_steps, dtype=np.float32)
    return np.broadcast_to(np.asarray(schedule(counts), np.float32), counts.shape)  # type: ignore


@lru_cache
def _transformation(make: Callable[[optax.Schedule], Any], head: str | None):
    """``table of learning rates -> transformation``, one function per optimizer."""

    def from_table(table):
        tx = make(lambda count: table[jnp.minimum(count, len(table) - 1)])
        if head is None:
            return tx
        return optimizers.head_only(tx, lambda name: name.startswith(f"{head}/"))

    return from_table
