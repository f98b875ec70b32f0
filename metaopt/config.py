"""What a name means, and the frozen settings of each job; checked when they are built."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import optax
import tyro

from metaopt import datasets, networks, optimizers, tasks
from metaopt.base import Task, TaskFamily, single
from metaopt.evaluation import Baseline
from metaopt.meta import NESConfig, TBPTTConfig


def _mlp(data: datasets.Dataset, *hidden: int, batch_size: int, activation=nn.relu) -> Task:
    net = networks.MLP((*hidden, data.num_classes), activation)
    return tasks.classification(net, data, batch_size=batch_size)


DATASETS: dict[str, Callable[[], datasets.Dataset]] = {
    "digits": datasets.digits,
    "moons": datasets.moons,
    "circles": datasets.circles,
    "spirals": datasets.spirals,
}

# Names -> constructors. A user's own task is named "package.module:function" instead.
TASKS: dict[str, Callable[[], Task]] = {
    "digits": lambda: _mlp(datasets.digits(), 32, batch_size=64),
    "digits-wide": lambda: _mlp(datasets.digits(), 128, batch_size=64),
    "digits-sigmoid": lambda: _mlp(datasets.digits(), 20, batch_size=128, activation=nn.sigmoid),
    "moons": lambda: _mlp(datasets.moons(), 32, batch_size=64),
    "circles": lambda: _mlp(datasets.circles(), 32, batch_size=64),
    "spirals": lambda: _mlp(datasets.spirals(), 32, batch_size=64),
    "quadratic": lambda: tasks.quadratic(dim=32, condition=100.0),
}


class SuiteTask(NamedTuple):
    """A task of a suite. Attributes: title: for people; task: a name; num_steps: per run."""

    title: str
    task: str
    num_steps: int


SUITES: dict[str, tuple[SuiteTask, ...]] = {
    "digits": (
        SuiteTask("digits, as in meta-training (100 steps)", "digits", 100),
        SuiteTask("ten times longer (1000 steps)", "digits", 1000),
        SuiteTask("another problem: spirals (1000 steps)", "spirals", 1000),
    ),
}


SCHEDULES: dict[str, Callable[[Any, int], optax.Schedule]] = {
    "constant": lambda lr, num_steps: lambda count: lr,
    "cosine": optimizers.cosine_decay,
}
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BASELINES: dict[str, Baseline] = {
    "sgd": Baseline("SGD", optax.sgd, SCHEDULES, (0.03, 0.1, 0.3, 0.6, 1.0, 3.0)),
    "adam": Baseline("Adam", optax.adam, SCHEDULES, ADAM_RATES),
    "adamw": Baseline("AdamW", optax.adamw, SCHEDULES, ADAM_RATES),
}


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Meta-train a learned optimizer and export it.

    Attributes:
      task: a built-in task, or your own as package.module:function (returns a metaopt.Task or
        TaskFamily).
      learned: which optimizer.
      base: base optimizers of l3rs, separated by commas.
      method: nes (evolution strategies) or tbptt (truncated back-propagation).
      steps: meta-updates of the whole run.
      nes: settings of --method nes.
      tbptt: settings of --method tbptt.
      validate_every: meta-updates between two validations; the best theta is exported.
      warm_start: export or run folder whose theta is the start; empty: a fresh one.
      seed: fixes all randomness.
      out: folder of the run; an interrupted run goes on when the command is given again.
      overwrite: start afresh where the folder holds a run.
    """

    task: str = "digits"
    learned: Literal["l3rs", "lstm", "velo"] = "l3rs"
    base: str = "sgd,adam"
    method: Literal["nes", "tbptt"] = "nes"
    steps: int = 300
    nes: NESConfig = field(default_factory=NESConfig)
    tbptt: TBPTTConfig = field(default_factory=TBPTTConfig)
    validate_every: int = 25
    warm_start: str = ""
    seed: int = 0
    out: Path = Path("runs/train")
    overwrite: bool = False

    def __post_init__(self):
        for name in ("steps", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainJob.{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer's constructor, as plain JSON data."""
        if self.learned == "l3rs":
            return {"base": [name.strip() for name in self.base.split(",") if name.strip()]}
        return {}

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share: all but where the run lies."""
        settings = dataclasses.asdict(self)
        for name in ("out", "overwrite", "nes" if self.method == "tbptt" else "tbptt"):
            del settings[name]
        return settings


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Run checkpoints, guarded checkpoints and tuned baselines on a suite.

    Attributes:
      checkpoints: export or run folders; the folder's name is the optimizer's name in tables.
      suite: which tasks.
      baselines: tuned hand-crafted optimizers, separated by commas.
      guards: guards put around each checkpoint, separated by commas; none: leave empty.
      fallback: the baseline that guards fall back to.
      seeds: runs per optimizer and task.
      tuning_seeds: runs per point of a baseline's grid.
      workers: processes that share the tasks of the suite.
      out: folder of the records; what is already there is not run again.
      overwrite: run everything again.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    suite: str = "digits"
    baselines: str = "sgd,adam"
    guards: str = "lgl2o,race"
    fallback: str = "sgd"
    seeds: int = 10
    tuning_seeds: int = 3
    workers: int = 1
    out: Path = Path("runs/evaluation")
    overwrite: bool = False

    def __post_init__(self):
        known("suite", self.suite, SUITES)
        for name in names(self.baselines):
            known("baseline", name, BASELINES)
        if names(self.guards) and self.fallback not in names(self.baselines):
            raise ValueError(
                f"EvaluateJob.fallback must be one of the baselines ({self.baselines}), "
                f"got {self.fallback!r}."
            )
        for name in ("seeds", "tuning_seeds", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"EvaluateJob.{name} must be at least 1, got {getattr(self, name)}."
                )


def names(text: str) -> list[str]:
    """``"a, b"`` -> ``["a", "b"]``."""
    return [name.strip() for name in text.split(",") if name.strip()]


def known(kind: str, name: str, table: Sequence[str] | dict[str, Any]) -> None:
    """Raises `ValueError` with the near matches unless `name` is in `table`."""
    if name not in table:
        near = difflib.get_close_matches(name, list(table), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(table)}."
        raise ValueError(f"unknown {kind} {name!r}; {hint}")


def task_family(name: str) -> TaskFamily:
    """The tasks behind a built-in name or behind a user's ``package.module:function``."""
    if ":" not in name:
        known("task", name, TASKS)
        return single(TASKS[name]())
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task {name!r}: {error}. Give package.module:function.") from None
    if isinstance(made, TaskFamily):
        return made
    if isinstance(made, Task):
        return single(made)
    raise ValueError(
        f"task {name!r}: the function must return a metaopt.Task or metaopt.TaskFamily, "
        f"got {type(made).__name__}."
    )
