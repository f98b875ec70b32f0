"""The frozen settings of each job; checked when they are built."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from metaopt.core.checks import check_fields, check_integer, check_known, check_number
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.suites import SUITES, fitted
from metaopt.meta import NESConfig, PESConfig, TBPTTConfig

LARGEST_SEED = 2**32 - 1
UNBOUNDED = 10**9  # meta-updates of a run that only its minutes end
# Settings of some optimizers only -> which; None where they are left at their defaults.
SERVED = {"ema": ("l3rs",), "hidden": ("lstm", "velo"), "p": ("lstm",), "bank": ("velo",)}
# Fields of a `TrainJob` that may change when its run is resumed.
WHERE_AND_HOW = (
    *("out", "overwrite", "resume_changed", "tensorboard", "checkpoint_every", "minutes"),
    *("population_chunk", "coordinator", "num_processes", "process_id", "cpu_devices"),
)


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Meta-train a learned optimizer and export it.

    Attributes:
      task: a built-in task, or your own as package.module:function (returns a metaopt.Task or
        TaskFamily); several, separated by commas, are trained on together.
      learned: which optimizer.
      base: base optimizers of l3rs, separated by commas.
      variant: of l3rs: embedding fits networks with the same layers only; none, global any.
      ema: averages of the features of l3rs (by default three); its docstring says which.
      hidden: units of lstm (by default 20) or velo (512).
      p: of lstm: it reads gradients down to e^-p by their logarithm (by default 10).
      bank: parameter sets that velo mixes (by default 256).
      method: nes (evolution strategies), pes (persistent evolution strategies) or tbptt
        (truncated back-propagation); docs/meta-training.md says which for what.
      steps: meta-updates of the whole run; by default 300, or with minutes as many as fit.
      minutes: the run ends after so long, the time of its earlier parts included; 0: no bound.
      nes: settings of --method nes.
      pes: settings of --method pes.
      tbptt: settings of --method tbptt.
      validate_every: meta-updates between two validations; the best theta is exported.
      validate_on: what is best: the held-out loss at the end of runs of the longest length (final)
        or the mean training loss along them (trajectory), to which a fast start counts too.
      checkpoint_every: meta-updates between two checkpoints, i.e. what a killed run may lose.
      warm_start: export or run folder whose theta is the start; empty: a fresh one.
      seed: fixes all randomness.
      out: folder of the run; an interrupted run goes on when the command is given again.
      overwrite: start afresh where the folder holds a run.
      resume_changed: go on with a run whose configuration was another one.
      tensorboard: write TensorBoard event files too (extra: metaopt-jax[tensorboard]).
      population_chunk: candidates of nes that a device evaluates at a time, which bounds its
        memory; 0: all of its share, or on CPU as many as it is fastest with.
      coordinator: auto joins the processes that Slurm, Open MPI or a TPU pod started; host:port
        of process 0 joins those that are given it; none joins nothing.
      num_processes: with host:port: how many processes there are.
      process_id: with host:port: which one this is, from 0.
      cpu_devices: devices that this process divides the CPU into, which share the work; 0: one
        per core.
    """

    task: str = "digits"
    learned: Literal["l3rs", "lstm", "velo"] = "l3rs"
    base: str = "sgd,adam"
    variant: Literal["embedding", "none", "per_layer", "global"] = "embedding"
    ema: Literal["three", "one", "raw", "none"] | None = None
    hidden: int | None = None
    p: float | None = None
    bank: int | None = None
    method: Literal["nes", "pes", "tbptt"] = "nes"
    steps: int | None = None
    minutes: float = 0.0
    nes: NESConfig = field(default_factory=NESConfig)
    pes: PESConfig = field(default_factory=PESConfig)
    tbptt: TBPTTConfig = field(default_factory=TBPTTConfig)
    validate_every: int = 25
    validate_on: Literal["final", "trajectory"] = "final"
    checkpoint_every: int = 25
    warm_start: str = ""
    seed: int = 0
    out: Path = Path("runs/train")
    overwrite: bool = False
    resume_changed: bool = False
    tensorboard: bool = False
    population_chunk: int = 0
    coordinator: str = "auto"
    num_processes: int | None = None
    process_id: int | None = None
    cpu_devices: int = 0

    def __post_init__(self):
        check_fields(self)
        for name in ("hidden", "bank", "steps", "validate_every", "checkpoint_every"):
            if (value := getattr(self, name)) is not None:
                check_integer(f"TrainJob.{name}", value, 1)
        if self.p is not None:
            check_number("TrainJob.p", self.p, above=0)
        for name in ("minutes", "population_chunk", "cpu_devices"):
            check_number(f"TrainJob.{name}", getattr(self, name), least=0)
        check_number("TrainJob.seed", self.seed, least=0, most=LARGEST_SEED)
        for name, served in SERVED.items():
            if getattr(self, name) is not None and self.learned not in served:
                of = " and ".join(served)
                raise ValueError(f"TrainJob.{name} is a setting of {of}, not of {self.learned}.")
        if not self.tasks:
            raise ValueError("TrainJob.task must name at least one task, got none.")

    @property
    def tasks(self) -> list[str]:
        """The names in `task`."""
        return names(self.task)

    @property
    def max_steps(self) -> int:
        """`steps`, or what stands for it where it is not given."""
        return self.steps or (UNBOUNDED if self.minutes else 300)

    @property
    def horizon(self) -> tuple[int, int]:
        """Steps of the shortest and of the longest inner run."""
        if self.method == "nes":
            return self.nes.min_steps, self.nes.max_steps
        windows = self.pes if self.method == "pes" else self.tbptt
        shortest = windows.rollout if windows.lengths == "fixed" else windows.min_rollout
        return shortest, windows.rollout

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer's constructor, as plain JSON data."""
        if self.learned == "l3rs":
            chosen = {} if self.variant == "embedding" else {"variant": self.variant}
            chosen |= {} if self.ema is None else {"ema": self.ema}
            return {"base": names(self.base), **chosen}
        chosen = {"hidden": self.hidden, "p": self.p, "bank": self.bank}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must share: what decides which theta comes out."""
        settings = dataclasses.asdict(self) | {"steps": self.max_steps}
        unused = {"nes", "pes", "tbptt"} - {self.method}
        unset = {name for name in SERVED if settings[name] is None}
        unset |= {"validate_on"} if self.validate_on == "final" else set()  # as runs begun without
        for name in (*WHERE_AND_HOW, *unused, *unset):
            del settings[name]
        return settings


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """Run checkpoints, guarded checkpoints and tuned baselines on a suite.

    Attributes:
      checkpoints: export or run folders; the folder's name is the optimizer's name in tables.
      suite: which tasks, and what is chosen here as None.
      baselines: tuned hand-crafted optimizers, separated by commas.
      guards: guards put around each checkpoint, separated by commas; empty: none.
      fallback: the baseline that guards fall back to.
      seeds: runs per optimizer and task.
      tuning_seeds: runs per point of a baseline's grid.
      num_steps: steps per run, instead of the suite's.
      window: steps per window of guards, and mini-batches they decide on.
      workers: processes that share the tasks of the suite.
      out: folder of the records; what is already there is not run again.
      overwrite: run everything again.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]] = ()
    suite: str = "digits"
    baselines: str | None = None
    guards: str | None = None
    fallback: str | None = None
    seeds: int | None = None
    tuning_seeds: int = 3
    num_steps: int | None = None
    window: int = 10
    workers: int = 1
    out: Path = Path("runs/evaluation")
    overwrite: bool = False

    def __post_init__(self):
        check_fields(self)
        check_known("suite", self.suite, SUITES)
        for name in ("baselines", "guards", "fallback", "seeds"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(SUITES[self.suite], name))
        for name in names(self.baselines):
            check_known("baseline", name, BASELINES)
        if names(self.guards) and self.fallback not in names(self.baselines):
            raise ValueError(
                f"EvaluateJob.fallback must be one of the baselines ({self.baselines}), "
                f"got {self.fallback!r}."
            )
        for name in ("seeds", "tuning_seeds", "num_steps", "window", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EvaluateJob.{name} must be at least 1, got {value}.")
        for task in SUITES[self.suite].tasks:
            fitted(task, self.num_steps, self.window)


def names(text: str | None) -> list[str]:
    """``"a, b"`` -> ``["a", "b"]``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
