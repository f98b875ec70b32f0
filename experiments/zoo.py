"""Meta-trains every optimizer of the zoo, measures it on its home task, and writes its card.

    make zoo      # or: python -m experiments.zoo [NAME ...] [--measure]

Needs MNIST and FashionMNIST (docs/data.md). Takes some hours on 2 cores (docs/zoo.md has the
minutes of each meta-training); it resumes from runs/zoo. Measures each optimizer beside tuned
baselines on its home task. Replaces metaopt/zoo/NAME, and writes docs/zoo.md. ``--measure`` only
measures the optimizers that ship with the package again. Weights that others have published are not
trained: put the authors' file at runs/zoo/NAME.state.
"""

import argparse
import dataclasses
import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import metaopt
from experiments.general import L3RS_JOB
from metaopt import zoo
from metaopt.core.files import write_whole
from metaopt.evaluation import contenders
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.comparing import ComparisonSettings, compare
from metaopt.evaluation.records import read_curves, read_record, write_json
from metaopt.evaluation.statistics import final_mean
from metaopt.evaluation.suites import SuiteTask
from metaopt.jobs.specialise import SpecialiseJob, point_text, search_and_train
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta import NESConfig, TBPTTConfig
from metaopt.meta.loop import read_metrics
from metaopt.optimizers import L3RS, LSTM, VeLO
from metaopt.zoo import exports

RUNS = Path("runs/zoo")
PAGE = Path("docs/zoo.md")
MOST_SHOWN = 41  # points of a card's curves
LICENCE = "LICENSE"  # file beside weights that others have published


class Recipe(NamedTuple):
    """How an optimizer is made, and what its card says beyond measurements.

    Attributes:
      about: one line.
      jobs: its meta-training, part by part; each starts from the theta of the one before. None:
        others have published theta.
      home: the task and the number of steps of the card's run.
      horizon: see `zoo.Card`.
      wins: see `zoo.Card`.
      loses: see `zoo.Card`.
      baselines: baselines that are tuned at home.
      room: the card's bound is the measured loss times this factor. The losses of fine-tuning are
        small, and differ by half with the rounding of a compiler.
      seeds: runs at home. Fine-tuning draws new classes for each run: between two sets of 4 runs
        the mean differs by a factor of five, between two sets of 16 by a half.
      trained: its meta-training in words, where it is not ours.
      source: where others have published theta; part of its export.
      specialised: instead of `jobs`, a search and the meta-training that begins with its result.
    """

    about: str
    jobs: tuple[TrainJob, ...]
    home: tuple[str, int]
    horizon: str
    wins: tuple[str, ...]
    loses: tuple[str, ...]
    baselines: tuple[str, ...] = ("sgd", "adam")
    room: float = 1.1
    seeds: int = 4
    trained: str = ""
    source: str = ""
    specialised: SpecialiseJob | None = None


def _lstm(task: str, steps: int, method: TBPTTConfig) -> TrainJob:
    """The LSTM of LGL2O: truncated back-propagation, runs of 100 steps."""
    return TrainJob(
        task=task,
        learned=LSTM(),
        method=method,
        steps=steps,
        validate_every=100,
        checkpoint_every=100,
    )


# Not the paper's: the logarithm of the loss, since late windows have small gradients; a running
# mean of theta; p = 7. Validation keeps update 400: by and by truncation makes it greedy, fast at
# first and worse later (0.243 to 0.276 after 300 steps), and evolution on whole runs does not.
_LONGER_WINDOWS = TBPTTConfig(
    rollout=300,
    lengths="log_uniform",
    min_rollout=40,
    objective="log",
    average=0.99,
    lr=1e-3,
    half_life=800,
    clip=1.0,
)
_LONGER = TrainJob(
    task="mnist-mlp20",
    learned=LSTM(p=7.0),
    method=_LONGER_WINDOWS,
    steps=1000,
    validate_every=100,
    checkpoint_every=100,
)
_WHOLE_RUNS = TrainJob(
    task="mnist-mlp20",
    learned=LSTM(p=7.0),
    method=NESConfig(
        population=24,
        tasks=1,
        sigma=0.01,
        lr=2e-3,
        half_life=200,
        objective="trajectory",
        min_steps=300,
        max_steps=300,
    ),
    steps=40,
    validate_every=10,
    checkpoint_every=10,
)
# The gradient of windows of 100 steps, second derivatives included: from a theta whose steps depend
# little on the size of the gradient (p = 7), it is of norm 1, and makes the start fast without
# slower steps later. Without them runs become worse, and in windows of 20 steps after a while too.
_FASTER_START_WINDOWS = TBPTTConfig(
    rollout=300,
    truncation=100,
    lengths="log_uniform",
    min_rollout=100,
    tasks=2,
    objective="log",
    second_order=True,
    average=0.95,
    lr=5e-4,
    half_life=100,
    clip=1.0,
)
_FASTER_START = dataclasses.replace(
    _LONGER,
    method=_FASTER_START_WINDOWS,
    steps=300,
    validate_every=20,
    validate_on="trajectory",
    checkpoint_every=20,
)
# The same on longer runs: of the windows fewer are first ones, more are late.
_LONGER_STILL = dataclasses.replace(
    _FASTER_START,
    method=dataclasses.replace(_FASTER_START_WINDOWS, rollout=400, average=0.97, half_life=80),
    steps=240,
    validate_every=30,
    checkpoint_every=30,
)

# From scratch an LSTM learns on CNN-3 what is fast for 100 steps, not to hold: where it makes the
# ReLUs die, back-propagation is without a gradient. The MLP's LSTM, as it is after two
# parts, begins with runs that hold (build that one first).
_TO_CNN = dataclasses.replace(
    _LONGER,
    task="fashion-cnn3",
    method=dataclasses.replace(_LONGER_WINDOWS, lr=2e-4),
    steps=300,
    warm_start="runs/zoo/lstm-mlp-mnist-300-2",
    validate_every=25,
    checkpoint_every=25,
)

# L3RS, section 4: few-class tasks from a pretrained CNN, K drawn from 10 to 100.
_NES = NESConfig(population=16, tasks=1, min_steps=10, max_steps=100)

# From the paper (arXiv 2501.12670) and the code of its authors.
_BY_ITS_AUTHORS = (
    "by its authors, with persistent evolution strategies on four MLPs 64-32-10 on 8x8 images "
    "(MNIST, FashionMNIST, CIFAR-10, SVHN), runs of 100 to 2000 steps"
)
_SOURCE = (
    "https://github.com/amoudgl/celo/blob/66d976116f39da286951f0c5e0a18eee8d1fd66b"
    "/algoperf/submissions"
)

RECIPES = {
    "lstm-mlp-mnist": Recipe(
        about="LSTM (2 x 20) for small sigmoid MLPs on images; a fast start, best under a guard",
        jobs=(
            _lstm("mnist-mlp20", 1225, TBPTTConfig()),
            _lstm("mnist-mlp20", 500, TBPTTConfig(lr=2e-4)),
        ),
        home=("mnist-mlp20", 100),
        horizon="100 steps; beyond some hundreds it needs a guard",
        wins=(
            "MLP-20 on MNIST: below tuned Adam for some 60 steps, below tuned SGD for some 150",
            "MLP-20 on FashionMNIST: below both at 100 steps",
        ),
        loses=(
            "runs of 1000 steps and more without a guard: it stalls",
            "CNN-3 on MNIST: the loss rises again after some 150 steps",
        ),
    ),
    "lstm-mlp-mnist-300": Recipe(
        about="LSTM (2 x 20) for small sigmoid MLPs on images, for runs of some hundred steps",
        jobs=(_LONGER, _WHOLE_RUNS, _FASTER_START, _LONGER_STILL),
        home=("mnist-mlp20", 300),
        horizon="300 steps; beyond some hundreds it needs a guard",
        wins=(
            "MLP-20 on MNIST: below tuned SGD and tuned Adam from step 20 to 340",
            "MLP-20 on FashionMNIST: below tuned SGD up to step 300, tuned Adam to 100",
        ),
        loses=(
            "spirals: lstm-mlp-mnist is ahead throughout, on circles for 5000 steps",
            "runs of 1000 steps and more without a guard: it stalls",
        ),
    ),
    "lstm-cnn-fmnist": Recipe(
        about="LSTM (2 x 20) for small CNNs on images; a fast start, best under a guard",
        jobs=(_lstm("fashion-cnn3", 2050, TBPTTConfig(lr=3e-4, clip=1.0)),),  # at 1e-3 it collapses
        home=("fashion-cnn3", 100),
        horizon="100 steps; beyond some hundreds it needs a guard",
        wins=(
            "CNN-3 on FashionMNIST: below tuned SGD for its 100 steps, a little behind tuned Adam",
        ),
        loses=("runs of 500 steps and more without a guard: the loss rises again",),
    ),
    "lstm-cnn-fmnist-300": Recipe(
        about="LSTM (2 x 20) for small CNNs on images, for runs of some hundred steps",
        jobs=(_TO_CNN,),
        home=("fashion-cnn3", 300),
        horizon="300 steps; seen to hold what it has up to 1000",
        wins=(
            "CNN-3 on FashionMNIST: below tuned SGD for 1000 steps, level with Adam to 400",
            "CNN-3 on MNIST: below tuned SGD for 950 steps, level with Adam to 350",
        ),
        loses=("runs of 500 steps and more: it stalls, and tuned Adam is ahead",),
    ),
    "l3rs-general": Recipe(
        about="L3RS (Adam + Muon) for networks of any kind; no learning rate to choose",
        jobs=(),
        specialised=L3RS_JOB,
        home=("digits", 1000),
        horizon="meta-trained on 30 to 1000 steps",
        wins=(
            "suite general: 1.77 times fewer steps than tuned Adam, won 17 of 19, lost 2",
            "the MLP on digits at 1000 steps, 4 seeds: below tuned Adam by 26%, tuned Muon by 12%",
        ),
        loses=(
            "suite general: tuned Muon is a little ahead of it (speed-up 0.92)",
            "small data that are repeated: it overfits 398 examples (0.30, tuned Adam 0.16)",
            "spirals at 1000 steps: 13 times the loss of tuned Adam",
            "an update holds Muon's, which on a CPU takes many times as long as Adam's",
        ),
        baselines=("adam", "muon"),
        room=1.25,
    ),
    "l3rs-finetune-cnn": Recipe(
        about="L3RS (SGD + Adam) for fine-tuning a pretrained CNN on a few new classes",
        jobs=(TrainJob(task="finetune", learned=L3RS(), method=_NES, steps=400),),
        home=("finetune-A", 100),
        horizon="10 to 100 steps",
        wins=("few-class fine-tuning of CNN-3 within its horizon",),
        loses=("networks with other layers: its embeddings do not fit them",),
        room=2.0,
        seeds=16,
    ),
    "velo-small": Recipe(
        about="VeLO (32 units, 16 banks) fine-tuning a pretrained CNN on a few new classes",
        jobs=(TrainJob(task="finetune", learned=VeLO(hidden=32, bank=16), method=_NES, steps=400),),
        home=("finetune-A", 100),
        horizon="10 to 100 steps; theta fits any network, and has seen only CNN-3",
        wins=("few-class fine-tuning of CNN-3 within its horizon",),
        loses=("runs of 300 steps and more without a guard: it diverges",),
        room=2.0,
        seeds=16,
    ),
    # What both cards say beside the home run: docs/results/celo/published.json.
    "celo": Recipe(
        about="Celo: published weights for networks of any kind; no learning rate to choose",
        jobs=(),
        home=("digits", 1000),
        horizon="some 300 to 2000 steps; all 4 runs of 5000 steps on digits diverge: use a guard",
        wins=(
            "MLP-20 on FashionMNIST at 300 and 2000 steps: below tuned Adam by 2% and 4%",
            "MLP-128x2 on FashionMNIST at 300 steps: below tuned Adam by 5%",
        ),
        loses=(
            "the MLP on digits at 100 and 1000 steps: 7 and 2.6 times the loss of tuned Adam",
            "a CNN on digits at 300 steps and MLP-20 on moons at 1000: behind tuned Adam",
            "runs of 5000 steps on digits: it diverges",
            "suite general: behind tuned Adam (speed-up 0.90, won 5, lost 9 of 19)",
        ),
        baselines=("adam",),
        room=1.25,
        trained=_BY_ITS_AUTHORS,
        source=f"{_SOURCE}/celo/theta.state",
    ),
    "celo-adam": Recipe(
        about="Celo-Adam: published weights that schedule Adam; no learning rate to choose",
        jobs=(),
        home=("digits", 1000),
        horizon="100 to 5000 steps; no run of ours diverged",
        wins=(
            "the MLP on digits at 100, 1000 and 5000 steps: below tuned Adam by 6% to 19%",
            "a CNN on digits at 300 steps: below tuned Adam by 11%",
            "MLP-20 on FashionMNIST at 300 steps: below tuned Adam by 6%",
        ),
        loses=(
            "MLP-20 on moons at 1000 steps: 6.6 times the loss of tuned Adam",
            "FashionMNIST, MLP-20 at 2000 steps, MLP-128x2 at 300: 3% and 4% behind tuned Adam",
            "suite general: behind tuned Adam (speed-up 0.67, won 1, lost 13 of 19)",
        ),
        baselines=("adam",),
        room=1.25,
        trained=_BY_ITS_AUTHORS,
        source=f"{_SOURCE}/celo_adam/theta.state",
    ),
}


def build(name: str, recipe: Recipe) -> Path:
    """Trains or reads, measures and exports one optimizer; every part resumes."""
    if recipe.specialised:
        return build_specialised(name, recipe, recipe.specialised)
    if not recipe.jobs:
        return build_published(name, recipe)
    jobs: list[TrainJob] = []
    for number, part in enumerate(recipe.jobs, start=1):
        out = RUNS / (name if number == 1 else f"{name}-{number}")
        start = str(jobs[-1].out) if jobs else part.warm_start
        jobs.append(dataclasses.replace(part, out=out, warm_start=start))
        meta_train(jobs[-1])
    export = metaopt.load(jobs[-1].out)
    origin = f"from {jobs[0].warm_start}: " if jobs[0].warm_start else ""
    trained = origin + "; then ".join(map(_trained, jobs))
    return _ship(name, recipe, export, trained, " && ".join(map(_command, jobs)))


def build_specialised(name: str, recipe: Recipe, job: SpecialiseJob) -> Path:
    """Trains, measures and exports an optimizer that begins as a search's result; it resumes."""
    export = metaopt.load(search_and_train(job))
    start = metaopt.load(job.start)
    assert isinstance(start.settings, L3RS)
    trained = f"a search on {job.task}: {point_text(start.trained['search']['point'])}"
    if job.minutes:
        trained += f"; then {_trained(job.training(start.settings))}"
    command = shlex.join(["metaopt", "specialise", job.task, *_flags(job, SpecialiseJob(), "task")])
    return _ship(name, recipe, export, trained, command)


def _ship(name: str, recipe: Recipe, export: metaopt.Exported, trained: str, command: str) -> Path:
    """Measures an optimizer of our own training at home, and writes its folder in the package."""
    card = zoo.Card(
        about=recipe.about,
        trained=trained,
        command=command,
        horizon=recipe.horizon,
        wins=list(recipe.wins),
        loses=list(recipe.loses),
        licence="Apache-2.0",
        home=measure(name, recipe, export),
    )
    folder = exports.save(zoo.FOLDER / name, export.settings, export.theta, export.trained)
    return _write(folder, card)


def build_published(name: str, recipe: Recipe) -> Path:
    """Measures and exports an optimizer whose theta others have published."""
    export = metaopt.load_published(RUNS / f"{name}.state")
    licence = (zoo.FOLDER / name / LICENCE).read_bytes()
    card = zoo.Card(
        about=recipe.about,
        trained=recipe.trained,
        command="",
        horizon=recipe.horizon,
        wins=list(recipe.wins),
        loses=list(recipe.loses),
        licence=" ".join(licence.decode().split()),
        home=measure(name, recipe, export),
    )
    trained = {"source": recipe.source, "sha256": export.sha256}
    folder = exports.save(zoo.FOLDER / name, export.settings, export.theta, trained)
    (folder / LICENCE).write_bytes(licence)
    return _write(folder, card)


def measure_again(name: str, recipe: Recipe) -> Path:
    """Measures the optimizer that ships with the package; the rest of its card stays."""
    folder = zoo.folder(name)
    home = measure(name, recipe, metaopt.load(folder))
    return _write(folder, zoo.card(name)._replace(home=home))


def measure(name: str, recipe: Recipe, export: metaopt.Exported) -> zoo.Home:
    """The final losses at home, of the optimizer and of the tuned baselines."""
    task, num_steps = recipe.home
    folder = RUNS / f"{name}-home-{export.sha256[:8]}-{recipe.seeds}"
    learned = contenders.from_export(name, export)
    compare(
        folder,
        SuiteTask(f"home of {name}", task, num_steps),
        recipe.baselines,
        lambda makes: [
            *(contenders.baseline(BASELINES[n].label, make) for n, make in makes.items()),
            contenders.plain(learned),
        ],
        ComparisonSettings(seeds=recipe.seeds),
    )
    record = read_record(folder)
    assert record is not None
    if record.left_out:
        raise RuntimeError(f"{name} cannot be measured at home: {record.left_out}")
    curves = {label: read_curves(folder / curve.file) for label, curve in record.curves.items()}
    reached = {label: final_mean(curve.loss) for label, curve in curves.items()}
    steps = curves[name].steps
    shown = np.unique(np.linspace(0, len(steps) - 1, MOST_SHOWN).astype(int))
    means = {
        label: [float(f"{loss:.4g}") for loss in curve.loss.mean(axis=0)[shown]]
        for label, curve in curves.items()
    }
    own = float(reached.pop(name).mean())
    others = {label: float(losses.mean()) for label, losses in reached.items()}
    return zoo.Home(
        task,
        num_steps,
        recipe.seeds,
        own,
        round(recipe.room * own, 4),
        others,
        [int(step) for step in steps[shown]],
        means,
    )


def _write(folder: Path, card: zoo.Card) -> Path:
    write_json(folder / zoo.CARD, card._asdict() | {"home": card.home._asdict()})
    return folder


def _trained(job: TrainJob) -> str:
    """On what, by what and for how long, from the metrics of the run."""
    metrics = read_metrics(job.out)
    minutes = sum(metrics["seconds"]) / 60
    steps = int(sum(metrics["inner_steps"]))
    return (
        f"{len(metrics['step'])} meta-updates of {job.method.name} on {job.task}, "
        f"{steps} inner steps, {minutes:.0f} minutes on a shared {platform.machine()} machine; "
        f"the best theta by held-out loss{'' if job.minutes else f' (of {job.max_steps} updates)'}"
    )


def _command(job: TrainJob) -> str:
    """The command line of `job`, with the settings that differ from the defaults."""
    words = ["metaopt", "train", *_flags(job, TrainJob())]
    for field in ("learned", "method"):
        settings = getattr(job, field)
        flags = _flags(settings, type(settings)(), prefix=f"{field}.")
        if flags or settings != getattr(TrainJob(), field):
            words += [f"{field}:{settings.name}", *flags]
    return shlex.join(words)


def _flags(settings: Any, default: Any, *left_out: str, prefix: str = "") -> list[str]:
    """The flags of the plain fields that differ from those of `default`."""
    words = []
    for field in dataclasses.fields(settings):
        if field.name in left_out:
            continue
        value = getattr(settings, field.name)
        if value != getattr(default, field.name) and not dataclasses.is_dataclass(value):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{prefix}{field.name.replace('_', '-')}", text]
    return words


def page() -> str:
    """docs/zoo.md: all cards."""
    parts = [
        "# The zoo\n",
        "These trained learned optimizers ship with the package. You load each with one line:\n",
        "```python\nimport metaopt\n",
        'tx = metaopt.load("lstm-mlp-mnist").apply(num_steps=100)\n```\n',
        "`metaopt zoo list` and `metaopt zoo show NAME` print these cards; "
        "`python -m experiments.zoo` trains them again. `l3rs-general` "
        "([L3RS](optimizers/l3rs.md)) and the published weights `celo` and `celo-adam` "
        "([Celo](optimizers/celo.md)) fit networks of any kind. The others are small, and made for "
        "small networks. To train one for your own job, see "
        "[specialising an optimizer](specialising.md). Losses are compared at equal numbers of "
        "steps. An update takes longer than Adam's: L3RS 1.8, VeLO 8.1 and an LSTM 158 times as "
        "long (published size of VeLO, an MLP of 1.09 M parameters, 2 CPU threads; "
        "[record](results/bench-step.json)).",
    ]
    for name in zoo.names():
        rows = zoo.rows(zoo.card(name))
        about = rows.pop("about")
        if "command" in rows:
            rows["command"] = f"`{rows['command']}`"
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        parts.append(f"\n## {name}\n\n{about}.\n\n| | |\n|---|---|\n{table}")
    return "\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Builds or measures the named optimizers, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RECIPES)}; none: all")
    parser.add_argument(
        "--measure", action="store_true", help="only measure what ships with the package again"
    )
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.names) - set(RECIPES)):
        parser.error(f"no recipes {unknown}; there are {', '.join(RECIPES)}")
    make = measure_again if args.measure else build
    for name in args.names or RECIPES:
        folder = make(name, RECIPES[name])
        print(json.dumps({name: zoo.card(name).home._asdict()}, indent=1), folder)
    write_whole(PAGE, page().encode())


if __name__ == "__main__":
    main()
