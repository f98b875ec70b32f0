"""What claims are checked on: the curves of one panel, by optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from metaopt.evaluation.records import Curves, TaskRecord, read_curves, read_index, read_record
from metaopt.evaluation.statistics import AVERAGED, final_mean, steps_to_reach
from metaopt.report.summary import training_runs

Outcome = Literal["reproduced", "partly", "not"]


@dataclass(frozen=True)
class Panel:
    """The records of one figure; optimizers go by their names there."""

    folder: Path

    @cached_property
    def record(self) -> TaskRecord:
        """What there is of the figure."""
        record = read_record(self.folder)
        assert record is not None, self.folder
        return record

    @cached_property
    def curves(self) -> dict[str, Curves]:
        """Name in the record -> curves."""
        return {n: read_curves(self.folder / c.file) for n, c in self.record.curves.items()}

    @cached_property
    def training(self) -> dict[str, dict[str, np.ndarray]]:
        """Label -> curves of a meta-training, where the folder is that of all figures."""
        return training_runs(read_index(self.folder))

    def meta_trainings(self, name: str) -> list[dict[str, np.ndarray]]:
        """The curves of each of an optimizer's meta-trainings: ``"NAME, seed N"`` in the index."""
        runs = [run for label, run in self.training.items() if label.startswith(f"{name}, ")]
        if not runs:
            raise KeyError(name)
        return runs

    def held_out(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(meta-updates, held-out losses) of each of an optimizer's meta-trainings."""
        runs = self.meta_trainings(name)
        there = [np.isfinite(run["validation_loss"]) for run in runs]
        return [
            (run["step"][keep], run["validation_loss"][keep])
            for run, keep in zip(runs, there, strict=True)
        ]

    def loss(self, name: str, step: int | None = None) -> float:
        """Mean test loss over seeds and the last measurements up to `step` (None: the end)."""
        curves = self.curves[name]
        end = len(curves.steps) if step is None else int(np.searchsorted(curves.steps, step)) + 1
        return float(final_mean(curves.loss[:, :end]).mean())

    def best(self, name: str) -> tuple[int, float]:
        """The step after which `loss` is lowest, and that loss."""
        curves = self.curves[name]
        mean = np.nan_to_num(curves.loss[:, 1:].mean(axis=0), nan=np.inf)
        width = min(AVERAGED, len(mean))
        running = np.lib.stride_tricks.sliding_window_view(mean, width).mean(axis=1)
        index = int(np.argmin(running))
        return int(curves.steps[index + width]), float(running[index])

    def start(self, name: str) -> float:
        """Mean test loss over seeds before the first step."""
        return float(self.curves[name].loss[:, 0].mean())

    def worst_seed(self, name: str) -> float:
        """The highest final loss of a seed; inf if one is not finite."""
        return float(np.nan_to_num(final_mean(self.curves[name].loss), nan=np.inf).max())

    def share(self, name: str, start: float, end: float) -> float:
        """Share of windows that the learned optimizer won, between two fractions of the run."""
        return float(self.state(name, "accepted", start, end).mean())

    def state(self, name: str, field: str, start: float, end: float) -> np.ndarray:
        """A recorded field ``[S, windows, ...]`` between two fractions of the run."""
        values = self.curves[name].state[field]
        windows = values.shape[1]
        return values[:, int(start * windows) : max(int(end * windows), int(start * windows) + 1)]

    def weight(self, name: str, base: str, start: float, end: float) -> float:
        """Mean weight alpha of a base optimizer, over seeds, layers and a part of the run."""
        index = self.record.curves[name].bases.index(base)
        return float(self.state(name, "alpha", start, end)[..., index].mean())

    def steps_to(self, name: str, loss: float) -> float:
        """The first step at which the mean test loss over seeds is at most `loss`, or inf."""
        curves = self.curves[name]
        return steps_to_reach(curves.steps, curves.loss.mean(axis=0), loss)


Check: TypeAlias = Callable[[Panel], tuple[Outcome, str]]  # the outcome, and our numbers


class Claim(NamedTuple):
    """A sentence of a paper and how it is decided.

    Attributes:
      figure: the paper's figure.
      text: the claim.
      panel: name of the figure's folder; "": all figures and the meta-trainings.
      check: decides the claim.
      reason: one line on the outcome.
    """

    figure: str
    text: str
    panel: str
    check: Check
    reason: str = ""


def graded(parts: Sequence[bool]) -> Outcome:
    """All of a claim's parts hold, some, or none."""
    return "reproduced" if all(parts) else "partly" if any(parts) else "not"
