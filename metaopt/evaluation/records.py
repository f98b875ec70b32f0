"""The folder of an evaluation: `metaopt evaluate` writes it, `metaopt report` reads it.

    OUT/evaluation.json          the job, its tasks, what it ran on
    OUT/TASK/record.json         what was tuned, which curves there are
    OUT/TASK/NAME.npz            the curves of one optimizer (`Curves`)
    OUT/TASK/tuning-NAME.npz     the curves of a baseline's whole grid

Imports numpy only, so that reports are drawn without JAX. Every file is written whole or not at
all, and pickled data is refused.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from metaopt.core.checks import check_choice, check_file_name, check_json
from metaopt.core.files import LARGEST, parse_json, read_plain, write_whole

FORMAT = 2
INDEX, RECORD = "evaluation.json", "record.json"
ALL = "all"  # in `TaskRecord.left_out`: the task itself could not be run

Kind = Literal["baseline", "learned", "guarded"]
_INDEX = {"job": dict, "tasks": [str]}
_RECORD = {
    **{"title": str, "task": str, "num_steps": int, "window": int, "tuned": {str: dict}},
    "left_out": {str: str},
    "velodrome": dict,
}
_CURVE = {"file": str, "kind": str, "learned": str, "guard": str, "fallback": str}
_CURVE |= {"layers": [str], "bases": [str]}
_AXES = {"lambda_": 3, "alpha": 4}  # of the states that reports draw, by the names of L3RS


class Curves(NamedTuple):
    """What one optimizer did on one task; S seeds, M measurements, W windows.

    Attributes:
      steps: optimizer steps taken before each measurement, ``[M + 1]``.
      grad_evals: gradients of mini-batch losses computed until then, ``[M + 1]``.
      seconds: wall-clock of the optimizer until then, per seed, ``[M + 1]``; measuring and
        compilation left out.
      loss, accuracy: on the whole test split, ``[S, M + 1]``; accuracy is NaN where the task has
        none.
      train_loss: on a fixed sample of the training split, ``[S, M + 1]``; NaN if not measured.
      windows: optimizer steps at the end of each window, ``[W]``.
      state: fields of the optimizer's state after each window, name -> ``[S, W, ...]``.
    """

    steps: Int[np.ndarray, " measurements"]
    grad_evals: Int[np.ndarray, " measurements"]
    seconds: Float[np.ndarray, " measurements"]
    loss: Float[np.ndarray, "S measurements"]
    accuracy: Float[np.ndarray, "S measurements"]
    train_loss: Float[np.ndarray, "S measurements"]
    windows: Int[np.ndarray, " W"]
    state: dict[str, np.ndarray]


class Grid(NamedTuple):
    """A baseline's whole search; P points, S seeds, M measurements.

    Attributes:
      steps: ``[M + 1]``.
      loss: on the validation split, ``[P, S, M + 1]``.
      seconds: wall-clock of the whole search, a scalar.
    """

    steps: Int[np.ndarray, " measurements"]
    loss: Float[np.ndarray, "P S measurements"]
    seconds: Float[np.ndarray, ""]


class CurveRecord(NamedTuple):
    """An entry of a task's record. All but `state`-related fields are what tables group by.

    Attributes:
      file: of the curves, in the task's folder.
      kind: baseline, learned or guarded.
      learned, guard, fallback: names of its parts; empty where there are none.
      layers, bases: of an L3RS: what axes 2 and 3 of its ``lambda_ [S, W, L]`` and
        ``alpha [S, W, L, P]`` stand for.
    """

    file: str
    kind: Kind
    learned: str = ""
    guard: str = ""
    fallback: str = ""
    layers: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()


class TaskRecord(NamedTuple):
    """``record.json`` of a task.

    Attributes:
      title, task, num_steps, window: what was run (as in the suite).
      tuned: baseline's label -> ``{"point", "grid": [points], "loss": [mean final validation loss
        per point], "seeds", "runs", "grad_evals", "seconds", "file"}``.
      curves: optimizer's name -> entry.
      left_out: optimizer's name, or `ALL` -> why it could not be run on this task.
      velodrome: ``{"name", "speedup": {optimizer: factor}}`` where the task has a published
        reference curve, else empty.
    """

    title: str
    task: str
    num_steps: int
    window: int
    tuned: dict[str, dict[str, Any]]
    curves: dict[str, CurveRecord]
    left_out: dict[str, str]
    velodrome: dict[str, Any]


def write_arrays(path: Path, arrays: Curves | Grid) -> None:
    """Writes curves or a grid as npz."""
    fields: dict[str, Any] = arrays._asdict()
    states: dict[str, Any] = fields.pop("state", {})
    fields |= {f"state/{name}": value for name, value in states.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **fields)
    write_whole(path, buffer.getvalue())


def read_curves(path: Path) -> Curves:
    """Reads the curves that `write_arrays` wrote."""
    arrays = _read_arrays(path, Curves)
    states = {k.removeprefix("state/"): v for k, v in arrays.items() if k.startswith("state/")}
    _check_axes(path, arrays, "loss", 2)
    shape, windows = arrays["loss"].shape, len(np.atleast_1d(arrays["windows"]))
    _check_steps(path, arrays, ("steps", "grad_evals", "seconds"))
    for name in ("accuracy", "train_loss"):
        _check(
            path, arrays[name].shape == shape, f"{name} of {arrays[name].shape}, loss of {shape}"
        )
    for name, state in states.items():
        fits = state.shape[:2] == (shape[0], windows) and _AXES.get(name, state.ndim) == state.ndim
        _check(path, fits, f"state {name} of {state.shape} for {windows} windows")
    return Curves(**{name: arrays[name] for name in Curves._fields[:-1]}, state=states)


def read_grid(path: Path) -> Grid:
    """Reads the grid that `write_arrays` wrote."""
    arrays = _read_arrays(path, Grid)
    _check_axes(path, arrays, "loss", 3)
    _check_steps(path, arrays, ("steps",))
    return Grid(**{name: arrays[name] for name in Grid._fields})


def _read_arrays(path: Path, kind: type[Curves] | type[Grid]) -> dict[str, np.ndarray]:
    """All arrays of an npz file that holds the fields of `kind`."""
    payload = read_plain(path)
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise ValueError(f"they would expand to more than {LARGEST} bytes")
        with np.load(io.BytesIO(payload), allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
        missing = set(kind._fields) - {"state"} - arrays.keys()
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        for name, array in arrays.items():
            if array.dtype.kind not in "biuf":
                raise ValueError(f"{name} holds {array.dtype}, no real numbers")
    except Exception as error:  # numpy and zipfile raise whatever damaged bytes lead them to
        raise ValueError(
            f"{path}: not the arrays of a {kind.__name__} ({str(error)[:300]}); run the evaluation "
            "again with --overwrite True."
        ) from None
    return arrays


def _check_axes(path: Path, arrays: dict[str, np.ndarray], name: str, axes: int) -> None:
    shape = arrays[name].shape
    _check(path, len(shape) == axes and 0 not in shape, f"{name} of {shape}, not of {axes} axes")


def _check_steps(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    """One entry per measurement of the loss, none below the one before."""
    number = arrays["loss"].shape[-1]
    for name in names:
        array = arrays[name]
        fits = array.shape == (number,) and bool(np.all(np.diff(array) >= 0))
        _check(
            path, fits and bool(np.isfinite(array).all()), f"{name} is not {number} growing numbers"
        )


def _check(path: Path, fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(
            f"{path}: its arrays do not fit together: {problem}; run the evaluation again with "
            "--overwrite True."
        )


def write_record(folder: Path, record: TaskRecord) -> None:
    """Writes a task's record."""
    plain = record._asdict()
    plain["curves"] = {name: entry._asdict() for name, entry in record.curves.items()}
    write_json(folder / RECORD, plain)


def read_record(folder: Path) -> TaskRecord | None:
    """Reads a task's record, or None where the task has not begun."""
    if not (folder / RECORD).exists():
        return None
    plain, path = read_json(folder / RECORD), folder / RECORD
    try:
        curves = {}
        for name, entry in plain.pop("curves").items():
            known = CurveRecord(**entry)
            curves[name] = known._replace(layers=tuple(known.layers), bases=tuple(known.bases))
        record = TaskRecord(**plain, curves=curves)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a record of format {FORMAT}: {error}.") from None
    check_json(f"{path}: record", plain, _RECORD)
    check_json(f"{path}: velodrome.speedup", record.velodrome.get("speedup", {}), {str: float})
    for name, entry in curves.items():
        where = f"{path}: curves.{name[:80]}"
        fields = {**entry._asdict(), "layers": list(entry.layers), "bases": list(entry.bases)}
        check_json(where, fields, _CURVE)
        check_file_name(f"{where}.file", entry.file)
        check_choice(f"{where}.kind", entry.kind, get_args(Kind))
    return record


def read_index(folder: Path) -> dict[str, Any]:
    """The index of an evaluation: ``{"format", "job", "tasks", "environment"}``."""
    if not (folder / INDEX).exists():
        raise ValueError(
            f"{folder}: holds no {INDEX}; give the --out folder of `metaopt evaluate`."
        )
    index, path = read_json(folder / INDEX), folder / INDEX
    check_json(f"{path}: index", index, dict)
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{path}: records of format {index.get('format')}, but this version reads "
            f"{FORMAT}; run the evaluation again with --overwrite True."
        )
    check_json(f"{path}: index", index, _INDEX)
    check_json(f"{path}: environment", index.get("environment", {}), dict)
    check_json(f"{path}: training", index.get("training", {}), {str: {str: [float | None]}})
    for name, metrics in index.get("training", {}).items():
        if len({len(values) for values in metrics.values()}) > 1:
            raise ValueError(f"{path}: training.{name[:80]} has metrics of different lengths.")
    for name in index["tasks"]:
        check_file_name(f"{path}: each entry of tasks", name)
    if len(set(index["tasks"])) < len(index["tasks"]):
        raise ValueError(f"{path}: tasks must differ, got {', '.join(index['tasks'])[:300]}.")
    return index


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as JSON."""
    write_whole(path, json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Reads JSON; a broken file is an error that names it."""
    payload = read_plain(path)
    try:
        return parse_json(payload)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}).") from None
