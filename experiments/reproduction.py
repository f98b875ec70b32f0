"""Runs the figures of a paper: each figure is one task of an evaluation.

The records are those of `metaopt evaluate`, so ``metaopt report FOLDER`` draws the figures from
what is committed. A run continues where it was interrupted, and runs only what has no record yet.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import metaopt
from metaopt.core.files import only_writer
from metaopt.core.processes import in_processes
from metaopt.evaluation import contenders
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.comparing import ComparisonSettings, compare
from metaopt.evaluation.contenders import Contender, Learned
from metaopt.evaluation.curves import Adjustable
from metaopt.evaluation.records import FORMAT, INDEX, read_index, write_json
from metaopt.evaluation.suites import SuiteTask
from metaopt.jobs.evaluate import environment
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta.loop import training_curves

TRAININGS = "trainings"  # what ``--only`` calls the meta-trainings

TunedBaselines = Mapping[str, Adjustable]
"""Name in `BASELINES` -> ``num_steps -> transformation``, at the best point of its grid."""

ExtraContenders = Callable[[Sequence[Learned], TunedBaselines], Sequence[Contender]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a paper, or one panel of it: optimizers that are compared on a task.

    Attributes:
      name: folder of its records.
      title: which figure of the paper it is, and on which task.
      task: a name in `metaopt.tasks.catalog.TASKS`.
      num_steps: steps of every run.
      measure_every: windows between two measurements.
      learned: the paper's name of each learned optimizer -> its name in the zoo, or the job that
        meta-trains it (once).
      guards: guards that are put around every learned optimizer, with each of the `fallbacks`.
      fallbacks: baselines that the guards fall back to; each must be one of `baselines`.
      baselines: names in `BASELINES`, tuned on the task.
      window: steps of a window, and held-out mini-batches on which a guard decides.
      extra_contenders: ``(learned optimizers, tuned baselines) -> contenders`` beyond these.
      seeds: runs of each contender; None: as many as in the paper's other figures.
    """

    name: str
    title: str
    task: str
    num_steps: int
    measure_every: int
    learned: Mapping[str, str | TrainJob]
    guards: tuple[str, ...] = ("gl2o", "lgl2o", "race")
    fallbacks: tuple[str, ...] = ("sgd-lgl2o",)
    baselines: tuple[str, ...] = ("sgd-lgl2o", "adam")
    window: int = 10
    extra_contenders: ExtraContenders | None = None
    seeds: int | None = None

    def contenders(self, tuned: TunedBaselines) -> list[Contender]:
        """The optimizers that are compared, in the order of tables."""
        entries = [contenders.baseline(BASELINES[name].label, make) for name, make in tuned.items()]
        optimizers = [_load(name, source) for name, source in self.learned.items()]
        for learned in optimizers:
            entries.append(contenders.plain(learned))
            for guard in self.guards:
                for fallback in self.fallbacks:
                    entries.append(
                        contenders.guarded(
                            learned,
                            guard,
                            fallback=BASELINES[fallback].label,
                            make=tuned[fallback],
                            window=self.window,
                            as_in_papers=True,
                        )
                    )
        if self.extra_contenders is not None:
            entries.extend(self.extra_contenders(optimizers, tuned))
        return entries


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """All figures of a paper.

    Attributes:
      title: title of the report.
      figures: ``full -> figures``; a function of a module, so that other processes can call it.
      seeds: runs of each contender.
      seeds_full: the same with ``--full``.
      out: folder of the committed records.
      trainings: ``full -> meta-trainings`` by label; their curves are a figure of the paper.
    """

    title: str
    figures: Callable[[bool], Sequence[Figure]]
    seeds: int
    seeds_full: int
    out: Path
    trainings: Callable[[bool], Mapping[str, TrainJob]] = lambda full: {}


def main(paper: Reproduction, module: str, argv: Sequence[str] | None = None) -> None:
    """The command line of an experiment: runs what has no record yet.

    Args:
      paper: what is reproduced.
      module: name of the experiment's module; the records name it in their command.
      argv: arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=paper.title)
    parser.add_argument("--full", action="store_true", help="the paper's scale; needs a GPU")
    parser.add_argument("--only", help="names of figures, separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the figures")
    parser.add_argument("--out", type=Path, default=paper.out, help="folder of the records")
    args = parser.parse_args(argv)
    figures, trainings = paper.figures(args.full), paper.trainings(args.full)
    names = [figure.name for figure in figures]
    if trainings:
        names.append(TRAININGS)
    selected = args.only.split(",") if args.only else names
    if unknown := sorted(set(selected) - set(names)):
        parser.error(f"--only: no figures {unknown}; there are {names}")

    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(args.out))
        except ValueError as error:
            parser.error(str(error))
        _write_records(paper, module, args, figures, trainings, selected)


def _write_records(
    paper: Reproduction,
    module: str,
    args: argparse.Namespace,
    figures: Sequence[Figure],
    trainings: Mapping[str, TrainJob],
    selected: Sequence[str],
) -> None:
    """Runs what is selected and has no record; the lock of the folder is held."""
    seeds = paper.seeds_full if args.full else paper.seeds
    index: dict[str, Any] = {
        "format": FORMAT,
        "job": {"suite": paper.title, "seeds": seeds},
        "tasks": [figure.name for figure in figures],
        "environment": environment(f"python -m {module}{' --full' if args.full else ''}"),
        "training": _recorded_trainings(args.out, trainings),
    }
    write_json(args.out / INDEX, index)

    calls = [
        (paper.figures, number, args.full, args.out, seeds)
        for number, figure in enumerate(figures)
        if figure.name in selected
    ]
    in_processes(_run_figure, calls, args.workers)
    if TRAININGS in selected:
        missing = {label: job for label, job in trainings.items() if label not in index["training"]}
        in_processes(meta_train, [(job,) for job in missing.values()], args.workers)
        for label, job in missing.items():
            index["training"][label] = training_curves(job.out)
        write_json(args.out / INDEX, index)


def _run_figure(
    figures: Callable[[bool], Sequence[Figure]], number: int, full: bool, out: Path, seeds: int
) -> None:
    """Runs one of the figures; it is built in the process that runs it."""
    figure = figures(full)[number]
    compare(
        out / figure.name,
        SuiteTask(
            title=figure.title,
            task=figure.task,
            num_steps=figure.num_steps,
            measure_every=figure.measure_every,
        ),
        figure.baselines,
        figure.contenders,
        ComparisonSettings(seeds=figure.seeds or seeds, window=figure.window),
    )


def _load(name: str, source: str | TrainJob) -> Learned:
    """An optimizer of the zoo, or one that is meta-trained first."""
    path = meta_train(source) if isinstance(source, TrainJob) else source
    return contenders.from_export(name, metaopt.load(path))


def _recorded_trainings(out: Path, trainings: Mapping[str, TrainJob]) -> dict[str, Any]:
    """Label -> curves of the meta-trainings that have a record."""
    if not (out / INDEX).exists():
        return {}
    recorded = read_index(out).get("training", {})
    return {label: recorded[label] for label in trainings if label in recorded}
