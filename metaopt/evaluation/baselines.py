"""Hand-crafted optimizers, the grids they are tuned on, and the search, cached with its curves."""

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
from metaopt.core.types import Keys, Task, TaskFamily
from metaopt.evaluation.curves import Adjustable, Recorder, begin, run, start_losses
from metaopt.evaluation.records import Grid, read_grid, read_json, write_arrays, write_json

Point = Mapping[str, Any]  # {"schedule": name, **arguments of the schedule}

# name -> (num_steps, **arguments) -> schedule of the learning rate
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": lambda num_steps, lr: optax.constant_schedule(lr),
    "cosine": lambda num_steps, lr: optimizers.cosine_decay(lr, num_steps),
    "power": lambda num_steps, lr, tau: optimizers.power_decay(lr, tau),
}


class Baseline(NamedTuple):
    """A hand-crafted optimizer and the grid it is tuned on.

    Attributes:
      label: how tables call it.
      make: ``schedule -> transformation``; a schedule maps the step count to a learning rate.
      grid: points that are tried.
      head_only: whether only the read-out layer is trained (fine-tuning).
    """

    label: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    grid: tuple[Point, ...]
    head_only: bool = False


def points(schedules: tuple[str, ...], **arguments: tuple[float, ...]) -> tuple[Point, ...]:
    """The product of schedules and arguments, e.g. ``points(("constant",), lr=(0.1, 0.3))``."""
    found: list[dict[str, Any]] = [{"schedule": schedule} for schedule in schedules]
    for name, values in arguments.items():
        found = [{**point, name: value} for point in found for value in values]
    return tuple(found)


_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_BOTH = ("constant", "cosine")
_LGL2O_TAU = points(("power",), lr=(3.0,), tau=(2e3, 5e3, 1e4, 2e4, 5e4))  # LGL2O, appendix E
# LGL2O names three rates of SGD on convolutional networks (appendices D and E), and two between.
_LGL2O_CONVOLUTIONAL = points(("power",), lr=(1e-4, 1e-2, 1e-1, 3e-1, 3.0), tau=(2e4, 5e4))
_CONSTANT = (3e-2, 1e-1, 3e-1, 1.0, 3.0)  # Meta Guard: 3.0
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
    "sgd-lgl2o": Baseline("SGD (LGL2O's grid)", optax.sgd, _LGL2O_TAU),
    "sgd-lgl2o-cnn": Baseline("SGD (LGL2O's grid, CNN)", optax.sgd, _LGL2O_CONVOLUTIONAL),
    "adam-lgl2o": Baseline("Adam (LGL2O's grid)", optax.adam, _LGL2O_ADAM),
    "sgd-meta-guard": Baseline("SGD (constant)", optax.sgd, points(("constant",), lr=_CONSTANT)),
    "sgd-meta-guard-3": Baseline("SGD at 3", optax.sgd, points(("constant",), lr=(3.0,))),
    "adam-l3rs": Baseline("Adam (L3RS's grid)", optax.adam, _L3RS_ADAM),
    "adam-l3rs-head": Baseline("Adam (head only)", optax.adam, _L3RS_ADAM, head_only=True),
}


def chosen(baseline: Baseline, point: Point, head: str = "") -> Adjustable:
    """``num_steps -> transformation`` for one point of the grid.

    Args:
      baseline, point: what to build.
      head: name of the read-out layer in the params, for a baseline that trains only this.
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
    """Grid search on the "valid" split: the lowest mean final loss over the seeds wins.

    The whole grid is one program: a point is its table of learning rates. After each window
    `progress` is told how many there were.

    Returns:
      A record of the search as plain JSON data (inf stands for points that diverged), and the
      curves of every run.
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
    seconds = time.perf_counter() - started
    loss = curves.loss.reshape(number, seeds, -1)
    final = np.where(np.isfinite(loss[..., -1]), loss[..., -1], np.inf).mean(axis=1)
    record = {
        "point": dict(baseline.grid[int(np.argmin(final))]),
        "grid": [dict(point) for point in baseline.grid],
        "loss": final.astype(float).tolist(),
        "seeds": seeds,
        "runs": number * seeds,
        "grad_evals": number * seeds * num_steps,
        "seconds": round(seconds, 3),
    }
    return record, Grid(curves.steps, loss, np.asarray(seconds))


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
    """`tune`, or what it found before on the same task with the same grid, keys and settings.

    A task is known by its name and by the losses at the starts of its runs, so that a search on
    data, or a network, that has changed since is not taken for this one.
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
    record_file, grid_file = folder / f"{digest}.json", folder / f"{digest}.npz"
    if record_file.exists() and grid_file.exists():
        grid = read_grid(grid_file)
        if np.allclose(grid.loss[0, :, 0], first, rtol=1e-4):
            return read_json(record_file), grid
    record, grid = tune(baseline, task, keys=keys, progress=progress, **settings)
    write_arrays(grid_file, grid)
    write_json(record_file, record)  # last: it says that the search is whole
    return record, grid


def _rates(point: Point, num_steps: int) -> np.ndarray:
    """The learning rate of each step, ``[num_steps]``."""
    arguments = {name: value for name, value in point.items() if name != "schedule"}
    schedule = SCHEDULES[point["schedule"]](num_steps, **arguments)
    counts = np.arange(num_steps, dtype=np.float32)
    return np.broadcast_to(np.asarray(schedule(counts), np.float32), counts.shape)  # type: ignore


@lru_cache
def _transformation(make: Callable[[optax.Schedule], Any], head: str | None):
    """``table of learning rates -> transformation``; one function for one optimizer."""

    def from_table(table):
        tx = make(lambda count: table[jnp.minimum(count, len(table) - 1)])
        if head is None:
            return tx
        return optimizers.head_only(tx, lambda name: name.startswith(f"{head}/"))

    return from_table
