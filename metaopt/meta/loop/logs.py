"""Logs of a run: metrics as JSON lines, TensorBoard events, and a progress bar on a terminal."""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from metaopt.core.checks import check_json
from metaopt.core.extras import optional_imports
from metaopt.core.files import parse_json, read_plain, write_whole

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


@contextlib.contextmanager
def log(folder: Path, done: int, steps: int, label: str, tensorboard: bool, about: str = ""):
    """Opens the logs of a run.

    Args:
      folder: of the run.
      done: steps already taken. Lines of later steps are dropped: these are taken again.
      steps: of the whole run.
      label: of the progress bar.
      tensorboard: write event files as well.
      about: a line above the progress bar.

    Yields:
      A function that logs the record of one step, ``{"step": ..., "meta_loss": ..., ...}``. Only
      process 0 writes.

    Raises:
      ValueError: when `tensorboard` is True and tensorboardX is not installed.
    """
    with contextlib.ExitStack() as stack:
        writers: list[Callable[[Mapping[str, Any]], None]] = []
        if jax.process_index() == 0:
            file = stack.enter_context(_metrics_file(folder / METRICS, done))

            def write_line(record):
                file.write(json.dumps(record) + "\n")
                file.flush()

            writers = [write_line, stack.enter_context(_progress(label, about, done, steps))]
            if tensorboard:
                writers.append(stack.enter_context(_events(folder / TENSORBOARD, done)))

        def write(record: Mapping[str, Any]) -> None:
            for writer in writers:
                writer(record)

        yield write


def _metrics_file(path: Path, done: int):
    """Opens the metrics for appending, without lines of steps that are taken again."""
    lines, steps = [], set()
    for line in read_plain(path).splitlines() if path.exists() else ():
        step = _step(line)
        if step is not None and step < done:
            lines.append(line + b"\n")
            steps.add(step)
    if lost := done - len(steps):
        warnings.warn(
            f"{path}: the metrics of {lost} of the {done} steps so far are missing; the run goes "
            "on, but its curves have gaps.",
            stacklevel=2,
        )
    write_whole(path, b"".join(lines))
    return open(path, "a", encoding="utf-8")


def _step(line: bytes) -> int | None:
    """The step of a line; None for a line that a killed run left incomplete."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


@contextlib.contextmanager
def _events(folder: Path, done: int):
    """Yields a function that writes the metrics of a step as TensorBoard scalars.

    Events of steps from `done` on, which are taken again, are marked for deletion.
    """
    with _writer(folder, done) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, record["step"])

        yield write


def _writer(folder: Path, done: int):
    """tensorboardX's writer of event files."""
    with optional_imports("tensorboard", needed_by="tensorboard=True"):
        from tensorboardX import SummaryWriter
    # File names contain the time in seconds. Without the suffix, a run that is resumed within the
    # second in which it started would overwrite its first file.
    return SummaryWriter(str(folder), purge_step=done or None, filename_suffix=f".{done}")


@contextlib.contextmanager
def _progress(label: str, about: str, done: int, steps: int):
    """Yields a function that advances a progress bar; it is shown only on a terminal.

    Worker processes show none.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("meta-loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:,.0f} inner steps/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty() or parent_process() is not None,
    )
    task = bar.add_task(label, total=steps, completed=done, loss=float("nan"), rate=0.0)

    def write(record: Mapping[str, Any]) -> None:
        rate, loss = record["inner_steps_per_second"], record["meta_loss"]
        bar.update(task, completed=record["step"] + 1, loss=loss, rate=rate)

    with bar:
        if about and not bar.disable:
            bar.console.print(about, highlight=False, markup=False)
        yield write


def read_metrics(folder: str | os.PathLike[str], name: str = METRICS) -> dict[str, np.ndarray]:
    """Reads the metrics of a run.

    Args:
      folder: of the run.
      name: of the file.

    Returns:
      Name of the metric -> float64 ``[steps]``, NaN where a step has none.

    Raises:
      ValueError: when the file is missing, or a line is not the metrics of a step.
    """
    path = Path(folder) / name
    records = []
    for number, line in enumerate(read_plain(path).splitlines(), start=1):
        try:
            records.append(parse_json(line))
            check_json("metrics", records[-1], {str: float})
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not the metrics of a step ({error})."
            ) from None
    names = sorted({name for record in records for name in record})
    return {
        name: np.array([record.get(name, np.nan) for record in records], np.float64)
        for name in names
    }


def training_curves(folder: str | os.PathLike[str], name: str = METRICS) -> dict[str, list[float]]:
    """The curves of a run that reports draw, by meta-update.

    Args:
      folder: of the run.
      name: of the file of metrics.

    Returns:
      ``{"step": ..., "meta_loss": ..., "validation_loss": ...}`` as lists; NaN is a gap.

    Raises:
      ValueError: as in `read_metrics`.
    """
    metrics = read_metrics(folder, name)
    names = ("step", "meta_loss", "validation_loss")
    return {metric: metrics[metric].tolist() for metric in names if metric in metrics}
