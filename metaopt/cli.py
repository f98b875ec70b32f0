"""The command line: `metaopt train | evaluate | report | data | zoo | bench`."""

import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from metaopt import datasets, zoo
from metaopt.core.extras import MissingExtra
from metaopt.datasets.sheet import contact_sheet
from metaopt.jobs.settings import EvaluateJob, TrainJob


@dataclass(frozen=True)
class ReportJob:
    """Draw an evaluation: report.html, summary.md and figures in its folder.

    Attributes:
      folder: the --out folder of `metaopt evaluate`.
    """

    folder: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class DataJob:
    """List the data sets, prepare one from files, or show one.

    Attributes:
      action: list, prepare or show.
      name: of the data set to prepare or show; a name of your own for a set of your own.
      source: prepare: the folder (or zip file) where the files lie.
      overwrite: prepare: replace a set that is there.
      out: show: where a picture of some examples is written (PNG); empty: nowhere.
    """

    action: tyro.conf.Positional[Literal["list", "prepare", "show"]] = "list"
    name: tyro.conf.Positional[str] = ""
    source: Annotated[str, tyro.conf.arg(name="from")] = ""
    overwrite: bool = False
    out: str = ""


@dataclass(frozen=True)
class ZooJob:
    """List the trained optimizers that ship with the package, or show the card of one.

    Attributes:
      action: list or show.
      name: of the optimizer to show.
      names: list: one bare name a line.
    """

    action: tyro.conf.Positional[Literal["list", "show"]] = "list"
    name: tyro.conf.Positional[str] = ""
    names: tyro.conf.UseCounterAction[int] = 0  # a switch: the other booleans take a value


@dataclass(frozen=True)
class BenchJob:
    """Measure speed as ratios within one run.

    Attributes:
      what: step (optimizer updates against Adam's), guards (windows against their parts), meta
        (meta-training against bare SGD runs, and two processes against one).
      out: where the record is written as JSON; empty: nowhere.
    """

    what: tyro.conf.Positional[Literal["step", "guards", "meta"]] = "step"
    out: str = ""


Command = (
    Annotated[TrainJob, tyro.conf.subcommand("train")]
    | Annotated[EvaluateJob, tyro.conf.subcommand("evaluate")]
    | Annotated[ReportJob, tyro.conf.subcommand("report")]
    | Annotated[DataJob, tyro.conf.subcommand("data")]
    | Annotated[ZooJob, tyro.conf.subcommand("zoo")]
    | Annotated[BenchJob, tyro.conf.subcommand("bench")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a user's mistake is one line on stderr and exit code 2."""
    if "" not in sys.path:  # a user's own task is a module of the folder they stand in
        sys.path.insert(0, "")
    try:
        job = _parse(sys.argv[1:] if argv is None else argv)
        RUN[type(job)](job)
    except (ValueError, OSError, MissingExtra) as error:
        print(f"metaopt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metaopt: interrupted; give the command again to go on.", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str]) -> Any:
    """tyro's parser, with its boxed error messages as one `ValueError` line."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                Command,  # type: ignore
                args=list(argv),
                prog="metaopt",
                description="Learned optimizers that are safe to use.",
                config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.FlagConversionOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        # A box: a title, the message, a rule, then where to get help.
        lines = [line.strip(" │") for line in messages.getvalue().splitlines()]
        body = []
        for line in lines[1:]:
            if re.match(r"^[─╰]", line):
                break
            if line.strip("-"):
                body.append(line)
        message = re.sub(r"^Error parsing \S*(Job|dummy)\S*: ", "", " ".join(body)).rstrip(".?")
        raise ValueError(f"{message}. See metaopt {_command(argv)}--help.") from None


def _command(argv: Sequence[str]) -> str:
    known_commands = ("train", "evaluate", "report", "data", "zoo", "bench")
    return f"{argv[0]} " if argv and argv[0] in known_commands else ""


def _train(job: TrainJob) -> None:
    import jax

    from metaopt.jobs import ended_as_begun, meta_train

    path = meta_train(job)
    if jax.process_index() == 0:  # the others do not wait until it is written
        note = ", the theta that it began with: no update was better on held-out runs"
        print(f"exported {path}{note * ended_as_begun(job)}")


def _evaluate(job: EvaluateJob) -> None:
    from metaopt.jobs import evaluate_suite

    folder = evaluate_suite(job)
    _report(ReportJob(folder))


def _report(job: ReportJob) -> None:
    from metaopt.report import print_summary, report

    print_summary(report(job.folder))


def _data(job: DataJob) -> None:
    if job.action == "list":
        _data_list(Console())
    elif job.action == "prepare":
        if not (job.name and job.source):
            raise ValueError("give `metaopt data prepare NAME --from DIR`; DIR holds the files.")
        made = datasets.prepare(job.name, job.source, overwrite=job.overwrite)
        state = "prepared" if made.fresh else "already prepared (--overwrite True replaces it)"
        print(f"{job.name}: {state} in {made.folder}" + (f"; {made.note}" if made.note else ""))
    else:
        data = datasets.load(job.name)
        if job.out:
            contact_sheet(data).save(job.out, "PNG")
        Console().print(_data_splits(data))


def _data_list(console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("name", "classes", "shape", "examples", "source", "state"):
        wraps = column in ("examples", "source")  # so that 80 columns are enough
        table.add_column(column, no_wrap=not wraps, min_width=9 if wraps else None)
    commands = []
    for name, spec in datasets.known().items():
        state = datasets.state(name)
        shape = "x".join(map(str, spec.shape))
        examples = " + ".join(map(str, spec.examples.values()))
        table.add_row(name, str(spec.num_classes), shape, examples, spec.source, state)
        if state == "not prepared":
            commands.append(f"{spec.command}   # DIR: {spec.files}")
    console.print(table)
    console.print(f"prepared sets lie in {datasets.data_root()}", soft_wrap=True, highlight=False)
    for command in commands:
        console.print(command, soft_wrap=True, highlight=False)


def _data_splits(data: datasets.Dataset) -> Table:
    table = Table(title=data.name, title_justify="left")
    for column in ("split", "examples", "shape", "dtype", "per class"):
        table.add_column(column)
    for split, examples in data.splits.items():
        counts = np.bincount(examples["y"], minlength=data.num_classes)
        x = examples["x"]
        row = (split, len(x), x.shape[1:], x.dtype, " ".join(map(str, counts)))
        table.add_row(*map(str, row))
    return table


def _zoo(job: ZooJob) -> None:
    if job.action == "show":
        table = Table(title=job.name, title_justify="left", show_header=False, box=None)
        table.add_column(style="dim", max_width=24)
        table.add_column()
        for row in zoo.rows(zoo.card(job.name)).items():
            table.add_row(*row)
        Console().print(table)
    elif job.names:
        print("\n".join(zoo.names()))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("what it is for")
        for name in zoo.names():
            table.add_row(name, zoo.card(name).about)
        Console().print(table)
        print('use one: metaopt.load("NAME").apply(num_steps=...)')


def _bench(job: BenchJob) -> None:
    bench = importlib.import_module(f"benchmarks.{job.what}")
    record = bench.run()
    Console().print(bench.table(record))
    if job.out:
        Path(job.out).parent.mkdir(parents=True, exist_ok=True)
        Path(job.out).write_text(json.dumps(record, indent=1) + "\n")


RUN = {
    TrainJob: _train,
    EvaluateJob: _evaluate,
    ReportJob: _report,
    DataJob: _data,
    ZooJob: _zoo,
    BenchJob: _bench,
}
