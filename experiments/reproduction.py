"""Figures of a paper as tasks of one evaluation: run, go on where it stopped, draw again.

The records are those of `metaopt evaluate`, so `metaopt report FOLDER` draws every figure again
from what is committed.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import metaopt
from metaopt.evaluation import contenders
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.comparing import Settings, compare
from metaopt.evaluation.contenders import Contender, Learned
from metaopt.evaluation.curves import Adjustable
from metaopt.evaluation.records import FORMAT, INDEX, read_index, write_json
from metaopt.evaluation.suites import SuiteTask
from metaopt.jobs import in_processes, meta_train
from metaopt.jobs.evaluate import environment
from metaopt.jobs.settings import TrainJob
from metaopt.meta.loop import training_curves
from metaopt.zoo.exports import Exported

Makes = dict[str, Adjustable]  # tuned baseline -> ``num_steps -> transformation``
TRAININGS = "trainings"  # what `--only` calls the meta-trainings


@dataclass(frozen=True)
class Figure:
    """One panel of a paper's figure.

    Attributes:
      name: of its folder of records.
      title: which figure it is, and on what.
      task: a name of `metaopt.tasks.catalog.TASKS`.
      num_steps: of every run.
      measure_every: windows between two measurements.
      learned: the paper's name of each learned optimizer -> a name of the zoo, or the job that
        meta-trains it (once).
      guards, fallbacks: every pair of them is run around every learned optimizer.
      baselines: tuned on the task; those of `fallbacks` are among them.
      window: steps per window, and mini-batches that a guard decides on.
      more: further contenders, ``(learned optimizers, tuned baselines) -> contenders``.
      seeds: runs per contender, if other than in the paper's other figures.
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
    more: Callable[[Sequence[Learned], Makes], Sequence[Contender]] = field(
        default=lambda learned, makes: ()
    )
    seeds: int | None = None

    def contenders(self, makes: Makes) -> list[Contender]:
        """What is run, in the order of tables."""
        found = [contenders.baseline(BASELINES[name].label, makes[name]) for name in makes]
        loaded = [
            contenders.from_export(name, _export(source)) for name, source in self.learned.items()
        ]
        for one in loaded:
            found.append(contenders.plain(one))
            for guard in self.guards:
                for name in self.fallbacks:
                    label, make = BASELINES[name].label, makes[name]
                    found.append(contenders.guarded(one, guard, label, make, self.window))
        return [*found, *self.more(loaded, makes)]


def _export(source: str | TrainJob) -> Exported:
    return metaopt.load(meta_train(source) if isinstance(source, TrainJob) else source)


@dataclass(frozen=True)
class Reproduction:
    """All figures of a paper.

    Attributes: title: of the report; figures: ``full -> figures``, a function of a module; seeds:
    runs per contender, and with ``--full``; out: where the records are committed; trainings:
    ``full -> meta-trainings`` by label, whose curves are a figure of the paper.
    """

    title: str
    figures: Callable[[bool], Sequence[Figure]]
    seeds: tuple[int, int]
    out: Path
    trainings: Callable[[bool], Mapping[str, TrainJob]] = lambda full: {}


def main(paper: Reproduction, module: str, argv: Sequence[str] | None = None) -> None:
    """The command line: runs what there are no records of yet."""
    parser = argparse.ArgumentParser(description=paper.title)
    parser.add_argument("--full", action="store_true", help="the paper's scale; wants a GPU")
    parser.add_argument("--only", help="names of figures, separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--out", type=Path, default=paper.out)
    given = parser.parse_args(argv)
    figures, seeds = paper.figures(given.full), paper.seeds[given.full]
    command = f"python -m {module}" + " --full" * given.full
    trainings = paper.trainings(given.full)
    index = _index(paper.title, figures, seeds, command, _known(given.out, trainings))
    write_json(given.out / INDEX, index)
    names = [figure.name for figure in figures] + [TRAININGS] * bool(trainings)
    wanted = given.only.split(",") if given.only else names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--only: no figures {unknown}; there are {names}")
    calls = [
        (paper.figures, number, given.full, given.out, seeds)
        for number, figure in enumerate(figures)
        if figure.name in wanted
    ]
    in_processes(_run_figure, calls, given.workers)
    if TRAININGS in wanted:
        new = {label: job for label, job in trainings.items() if label not in index["training"]}
        in_processes(meta_train, [(job,) for job in new.values()], given.workers)
        found = {label: training_curves(job.out) for label, job in new.items()}
        write_json(given.out / INDEX, index | {"training": index["training"] | found})


def _run_figure(figures, number: int, full: bool, out: Path, seeds: int) -> None:
    figure: Figure = figures(full)[number]
    compare(
        out / figure.name,
        SuiteTask(figure.title, figure.task, figure.num_steps, figure.measure_every),
        figure.baselines,
        figure.contenders,
        Settings(figure.seeds or seeds, window=figure.window),
    )


def _known(out: Path, trainings: Mapping[str, TrainJob]) -> dict[str, Any]:
    """The curves of meta-trainings that are recorded already."""
    recorded = read_index(out).get("training", {}) if (out / INDEX).exists() else {}
    return {label: recorded[label] for label in trainings if label in recorded}


def _index(
    title: str, figures: Sequence[Figure], seeds: int, command: str, training: dict[str, Any]
) -> dict[str, Any]:
    """The index of the evaluation, for `metaopt report`."""
    return {
        "format": FORMAT,
        "job": {"suite": title, "seeds": seeds},
        "tasks": [figure.name for figure in figures],
        "environment": environment(command),
        "training": training,
    }
