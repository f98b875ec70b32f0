"""`metaopt data`: list, prepare and show data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from metaopt import datasets


@dataclass(frozen=True)
class DataJob:
    """List the data sets, prepare one from files, or show one.

    Attributes:
      action: list, prepare or show.
      name: of the data set to prepare or show; a name of your own for a set of your own.
      source: prepare: the folder (or zip file) with the files.
      overwrite: prepare: replace a set that is already prepared.
      out: show: where to write a picture of some examples (PNG); empty: nowhere.
    """

    action: tyro.conf.Positional[Literal["list", "prepare", "show"]] = "list"
    name: tyro.conf.Positional[str] = ""
    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    overwrite: bool = False
    out: str = ""


def run(job: DataJob) -> None:
    """Lists the data sets, prepares one, or shows one."""
    if job.action == "list":
        _list(Console())
    elif job.action == "prepare":
        _prepare(job)
    else:
        _show(job, Console())


def _prepare(job: DataJob) -> None:
    if not (job.name and job.source):
        raise ValueError("give `metaopt data prepare NAME --from DIR`; DIR holds the files.")
    result = datasets.prepare(job.name, job.source, overwrite=job.overwrite)
    state = "prepared" if result.fresh else "already prepared (--overwrite True replaces it)"
    note = f"; {result.note}" if result.note else ""
    print(f"{job.name}: {state} in {result.folder}{note}")


def _list(console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("name", "classes", "shape", "examples", "source", "state"):
        wraps = column in ("examples", "source")  # so that 80 columns are enough
        table.add_column(column, no_wrap=not wraps, min_width=9 if wraps else None)
    commands = []
    for name, spec in datasets.specs().items():
        state = datasets.state(name)
        table.add_row(
            name,
            str(spec.num_classes),
            "x".join(map(str, spec.shape)),
            " + ".join(map(str, spec.examples.values())),
            spec.source,
            state,
        )
        if state == "not prepared":
            commands.append(f"{spec.command}   # DIR: {spec.files}")
    console.print(table)
    console.print(f"prepared sets are in {datasets.data_root()}", soft_wrap=True, highlight=False)
    for command in commands:
        console.print(command, soft_wrap=True, highlight=False)


def _show(job: DataJob, console: Console) -> None:
    from metaopt.datasets.pictures import contact_sheet, encode_png  # loads JAX

    data = datasets.load(job.name)
    if job.out:
        Path(job.out).write_bytes(encode_png(contact_sheet(data)))
    table = Table(title=data.name, title_justify="left")
    for column in ("split", "examples", "shape", "dtype", "per class"):
        table.add_column(column)
    for split, examples in data.splits.items():
        x = examples["x"]
        counts = np.bincount(examples["y"], minlength=data.num_classes)
        table.add_row(
            split, str(len(x)), str(x.shape[1:]), str(x.dtype), " ".join(map(str, counts))
        )
    console.print(table)
