"""What a run tells: metrics as JSON lines, TensorBoard events if wanted, a bar on a terminal."""

import contextlib
import json
import os
import sys
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
def log(folder: Path, done: int, steps: int, label: str, tensorboard: bool):
    """A function that takes the record of each step; only process 0 writes anything.

    Args:
      folder: of the run.
      done: steps already taken; lines of later ones are dropped, they will be taken again.
      steps: of the whole run; label: for the progress bar.
      tensorboard: write event files as well.
    """
    with contextlib.ExitStack() as stack:
        writers: list[Callable[[Mapping[str, Any]], None]] = []
        if jax.process_index() == 0:
            file = stack.enter_context(_metrics_file(folder / METRICS, done))

            def write_line(record):
                file.write(json.dumps(record) + "\n")
                file.flush()

            writers = [write_line, stack.enter_context(_progress(label, done, steps))]
            if tensorboard:
                writers.append(stack.enter_context(_events(folder / TENSORBOARD, done)))

        def write(record: Mapping[str, Any]) -> None:
            for writer in writers:
                writer(record)

        yield write


def _metrics_file(path: Path, done: int):
    """Opens the metrics for appending, without lines of steps that will be taken again."""
    if path.exists():
        kept = []
        for line in path.read_bytes().splitlines():
            step = _step(line)
            if step is not None and step < done:  # None: the last line of a killed run
                kept.append(line.decode() + "\n")
        write_whole(path, "".join(kept).encode())
    return open(path, "a")


def _step(line: bytes) -> int | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


@contextlib.contextmanager
def _events(folder: Path, done: int):
    """TensorBoard scalars under the names of the metrics; steps taken again replace the old."""
    with _writer(folder, done) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, record["step"])

        yield write


def _writer(folder: Path, done: int):
    with optional_imports("tensorboard", needed_by="tensorboard=True"):
        from tensorboardX import SummaryWriter
    # Files are named by the second: without the suffix, a run that goes on within the one in which
    # it began would write over its first file.
    return SummaryWriter(str(folder), purge_step=done or None, filename_suffix=f".{done}")


@contextlib.contextmanager
def _progress(label: str, done: int, steps: int):
    """A progress bar on a terminal, and nothing elsewhere, nor in a worker process."""
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
        yield write


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The metrics of a run as one array per name, NaN where a step has none."""
    path = Path(folder) / METRICS
    records = []
    for number, line in enumerate(read_plain(path).splitlines(), start=1):
        try:
            records.append(parse_json(line))
            check_json("metrics", records[-1], {str: float})
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not the metrics of a step ({error})."
            ) from None
    names = {name for record in records for name in record}
    return {n: np.array([r.get(n, np.nan) for r in records], np.float64) for n in sorted(names)}


def training_curves(folder: str | os.PathLike[str]) -> dict[str, list[float]]:
    """What reports draw of a run: meta-loss and held-out loss by meta-update; NaN: a gap."""
    metrics = read_metrics(folder)
    names = ("step", "meta_loss", "validation_loss")
    return {name: metrics[name].tolist() for name in names if name in metrics}
