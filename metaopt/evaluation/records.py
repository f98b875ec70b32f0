"""Records of an evaluation on disk: `metaopt evaluate` writes them, `metaopt report` reads them.

    OUT/evaluation.json          the job, its tasks, the environment it ran in
    OUT/TASK/record.json         the tuned baselines and the list of curves
    OUT/TASK/NAME.npz            curves of one optimizer (`Curves`)
    OUT/TASK/tuning-NAME.npz     curves of a baseline's grid search (`Grid`)

This module imports numpy only, so that reports are drawn without JAX. Files are written atomically,
and pickled data is refused.
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
ALL = "all"  # key of `TaskRecord.left_out` for a task that could not be run at all

Kind = Literal["baseline", "learned", "guarded"]

# JSON schemas, for `check_json`.
_INDEX = {"job": dict, "tasks": [str]}
_RECORD = {
    "title": str,
    "task": str,
    "num_steps": int,
    "window": int,
    "tuned": {str: dict},
    "left_out": {str: str},
    "velodrome": dict,
}
_CURVE = {
    "file": str,
    "kind": str,
    "learned": str,
    "guard": str,
    "fallback": str,
    "layers": [str],
    "bases": [str],
}
# Number of axes of the recorded states that reports draw: step norm and weights of L3RS.
_AXES = {"lambda_": 3, "alpha": 4}


class Curves(NamedTuple):
    """Curves of one optimizer on one task.

    S is the number of seeds, M the number of measurements and W the number of windows. The first
    measurement is taken before the first step.

    Attributes:
      steps: optimizer steps before each measurement.
      grad_evals: gradients of mini-batch losses computed before each measurement.
      seconds: wall-clock time of the optimizer before each measurement, per seed; the time to
        measure and to compile does not count.
      loss: loss on the whole test split.
      accuracy: accuracy on the whole test split; NaN where the task has none.
      train_loss: loss on a fixed sample of the training split; NaN if not measured.
      windows: optimizer steps at the end of each window.
      state: recorded fields of the optimizer's state after each window, name -> ``[S, W, ...]``.
    """

    steps: Int[np.ndarray, " M"]
    grad_evals: Int[np.ndarray, " M"]
    seconds: Float[np.ndarray, " M"]
    loss: Float[np.ndarray, "S M"]
    accuracy: Float[np.ndarray, "S M"]
    train_loss: Float[np.ndarray, "S M"]
    windows: Int[np.ndarray, " W"]
    state: dict[str, np.ndarray]


class Grid(NamedTuple):
    """Curves of a baseline's grid search: P points, S seeds, M measurements.

    Attributes:
      steps: optimizer steps before each measurement.
      loss: loss on the validation split.
      seconds: wall-clock time of the whole search.
    """

    steps: Int[np.ndarray, " M"]
    loss: Float[np.ndarray, "P S M"]
    seconds: Float[np.ndarray, ""]


class CurveRecord(NamedTuple):
    """Entry of one optimizer in a task's record.

    Attributes:
      file: name of the file of curves in the task's folder.
      kind: baseline, learned or guarded.
      learned: name of the learned optimizer, or empty.
      guard: name of the guard, or empty.
      fallback: name of the guard's fallback, or empty.
      layers: names of the layers along axis 2 of L3RS's ``lambda_ [S, W, L]`` and
        ``alpha [S, W, L, P]``; empty for other optimizers.
      bases: names of the base optimizers along axis 3 of L3RS's ``alpha``; empty for others.
    """

    file: str
    kind: Kind
    learned: str = ""
    guard: str = ""
    fallback: str = ""
    layers: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()


class TaskRecord(NamedTuple):
    """The record of a task, ``record.json``.

    Attributes:
      title: title of the task for readers.
      task: name in `metaopt.tasks.catalog.TASKS`.
      num_steps: optimizer steps per run.
      window: optimizer steps per window.
      tuned: label of a baseline -> its grid search: ``{"point", "grid": [points], "loss": [mean
        validation loss after the last step, per point], "seeds", "runs", "grad_evals", "seconds",
        "file"}``. Since grids extend themselves also ``"extended"``, the number of learning rates
        added to the grid (the points of extensions follow it in "grid", and drawn ones follow
        these), and ``"edge"``: "lowest" or "highest" where the best rate of the grid is the last
        one on this side, else "".
      curves: name of an optimizer -> its entry.
      left_out: name of an optimizer, or `ALL` -> the reason why it could not be run on this task.
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
    write_whole(path, npz(arrays))


def npz(arrays: Curves | Grid) -> bytes:
    """Curves or a grid as the content of an npz file."""
    fields: dict[str, Any] = arrays._asdict()
    states: dict[str, Any] = fields.pop("state", {})
    fields |= {f"state/{name}": value for name, value in states.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **fields)
    return buffer.getvalue()


def read_curves(path: Path) -> Curves:
    """Reads the curves that `write_arrays` wrote.

    Raises:
      ValueError: when the file holds no curves, or arrays whose shapes do not match.
    """
    arrays = _parse_arrays(path, read_plain(path), Curves)
    states = {
        name.removeprefix("state/"): values
        for name, values in arrays.items()
        if name.startswith("state/")
    }
    _check_axes(path, arrays, "loss", 2)
    _check_steps(path, arrays, ("steps", "grad_evals", "seconds"))
    shape, windows = arrays["loss"].shape, len(np.atleast_1d(arrays["windows"]))
    for name in ("accuracy", "train_loss"):
        problem = f"{name} has shape {arrays[name].shape} and loss {shape}"
        _check(path, arrays[name].shape == shape, problem)
    for name, state in states.items():
        matches = state.shape[:2] == (shape[0], windows)
        matches = matches and state.ndim == _AXES.get(name, state.ndim)
        _check(path, matches, f"state {name} has shape {state.shape} for {windows} windows")
    return Curves(**{name: arrays[name] for name in Curves._fields[:-1]}, state=states)


def read_grid(path: Path) -> Grid:
    """Reads the grid that `write_arrays` wrote.

    Raises:
      ValueError: when the file holds no grid, or arrays whose shapes do not match.
    """
    return parse_grid(path, read_plain(path))


def parse_grid(path: Path, payload: bytes) -> Grid:
    """The grid with this content; `path` is for messages.

    Raises:
      ValueError: see `read_grid`.
    """
    arrays = _parse_arrays(path, payload, Grid)
    _check_axes(path, arrays, "loss", 3)
    _check_steps(path, arrays, ("steps",))
    return Grid(**{name: arrays[name] for name in Grid._fields})


def _parse_arrays(
    path: Path, payload: bytes, kind: type[Curves] | type[Grid]
) -> dict[str, np.ndarray]:
    """All arrays of an npz file; the fields of `kind` are among them."""
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
                raise ValueError(f"{name} has dtype {array.dtype} and not real numbers")
    except Exception as error:  # damaged bytes raise almost anything in numpy and zipfile
        raise ValueError(
            f"{path}: not the arrays of a {kind.__name__} record ({str(error)[:300]}); run the "
            "evaluation again with --overwrite True."
        ) from None
    return arrays


def _check_axes(path: Path, arrays: dict[str, np.ndarray], name: str, axes: int) -> None:
    shape = arrays[name].shape
    matches = len(shape) == axes and 0 not in shape
    _check(path, matches, f"{name} has shape {shape} and not {axes} non-empty axes")


def _check_steps(path: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...]) -> None:
    """Each of the arrays has one finite entry per measurement and never decreases."""
    number = arrays["loss"].shape[-1]
    for name in names:
        array = arrays[name]
        matches = array.shape == (number,) and bool(np.all(np.diff(array) >= 0))
        matches = matches and bool(np.isfinite(array).all())
        _check(path, matches, f"{name} is not {number} non-decreasing numbers")


def _check(path: Path, matches: bool, problem: str) -> None:
    if not matches:
        raise ValueError(
            f"{path}: the arrays do not match: {problem}; run the evaluation again with "
            "--overwrite True."
        )


def write_record(folder: Path, record: TaskRecord) -> None:
    """Writes a task's record into its folder."""
    plain = record._asdict()
    plain["curves"] = {name: entry._asdict() for name, entry in record.curves.items()}
    write_json(folder / RECORD, plain)


def read_record(folder: Path) -> TaskRecord | None:
    """Reads a task's record, or returns None if the task has not been started.

    Raises:
      ValueError: when the file is not a record of this format.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    plain = read_json(path)
    try:
        curves = {}
        for name, fields in plain.pop("curves").items():
            entry = CurveRecord(**fields)
            curves[name] = entry._replace(layers=tuple(entry.layers), bases=tuple(entry.bases))
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
    """Reads the index of an evaluation: ``{"format", "job", "tasks", "environment"}``.

    The index also has ``"training"``, curves of meta-training by name, and ``"training_cost"``,
    its inner steps and seconds, where they are known.

    Raises:
      ValueError: when the folder has no index, or one of another format.
    """
    path = folder / INDEX
    if not path.exists():
        raise ValueError(
            f"{folder}: holds no {INDEX}; give the --out folder of `metaopt evaluate`."
        )
    index = read_json(path)
    check_json(f"{path}: index", index, dict)
    if index.get("format") != FORMAT:
        raise ValueError(
            f"{path}: records of format {index.get('format')}, but this version reads "
            f"{FORMAT}; run the evaluation again with --overwrite True."
        )
    check_json(f"{path}: index", index, _INDEX)
    check_json(f"{path}: environment", index.get("environment", {}), dict)
    check_json(f"{path}: training", index.get("training", {}), {str: {str: [float | None]}})
    costs = {str: {"inner_steps": float, "seconds": float}}
    check_json(f"{path}: training_cost", index.get("training_cost", {}), costs)
    for name, metrics in index.get("training", {}).items():
        if len({len(values) for values in metrics.values()}) > 1:
            raise ValueError(f"{path}: training.{name[:80]} has metrics of different lengths.")
    for name in index["tasks"]:
        check_file_name(f"{path}: each entry of tasks", name)
    if len(set(index["tasks"])) < len(index["tasks"]):
        raise ValueError(f"{path}: tasks must be distinct, got {', '.join(index['tasks'])[:300]}.")
    return index


def write_json(path: Path, value: Any) -> None:
    """Writes plain data as JSON."""
    write_whole(path, json.dumps(value, indent=1).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: when the file is not valid JSON; the message names it.
    """
    payload = read_plain(path)
    try:
        return parse_json(payload)
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}).") from None
