"""The records of one figure of a paper, and the numbers that its claims are decided on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from metaopt.evaluation.records import Curves, TaskRecord, read_curves, read_index, read_record
from metaopt.evaluation.statistics import AVERAGED, final_mean, steps_to_reach
from metaopt.report.summary import training_runs


@dataclass(frozen=True)
class FigureRecords:
    """The records of one figure, or of a paper's meta-trainings.

    Methods take an optimizer by its name in the records, and raise `KeyError` when there are no
    records of it.

    Attributes:
      folder: of the figure (``record.json`` and curves), or of the whole paper (``evaluation.json``
        with the curves of the meta-trainings).
    """

    folder: Path

    @cached_property
    def record(self) -> TaskRecord:
        """The record of the figure."""
        record = read_record(self.folder)
        assert record is not None, self.folder
        return record

    @cached_property
    def curves(self) -> dict[str, Curves]:
        """Name of an optimizer -> its curves."""
        return {
            name: read_curves(self.folder / curve.file)
            for name, curve in self.record.curves.items()
        }

    @cached_property
    def training(self) -> dict[str, dict[str, np.ndarray]]:
        """Label of a meta-training -> metric -> values; needs the folder of the whole paper."""
        return training_runs(read_index(self.folder))

    def loss(self, name: str, step: int | None = None) -> float:
        """Mean test loss over seeds and the last measurements up to `step` (None: the end)."""
        curves = self.curves[name]
        end = len(curves.steps) if step is None else int(np.searchsorted(curves.steps, step)) + 1
        return float(final_mean(curves.loss[:, :end]).mean())

    def lowest_loss(self, name: str) -> tuple[int, float]:
        """The step at which `loss` is lowest, and that loss."""
        curves = self.curves[name]
        mean = np.nan_to_num(curves.loss[:, 1:].mean(axis=0), nan=np.inf)
        width = min(AVERAGED, len(mean))
        running = np.lib.stride_tricks.sliding_window_view(mean, width).mean(axis=1)
        index = int(np.argmin(running))
        return int(curves.steps[index + width]), float(running[index])

    def initial_loss(self, name: str) -> float:
        """Mean test loss over seeds before the first step."""
        return float(self.curves[name].loss[:, 0].mean())

    def worst_final_loss(self, name: str) -> float:
        """The highest final loss of a seed; inf if one is not finite."""
        return float(np.nan_to_num(final_mean(self.curves[name].loss), nan=np.inf).max())

    def steps_to(self, name: str, loss: float) -> float:
        """The first step at which the mean test loss over seeds is at most `loss`, or inf."""
        curves = self.curves[name]
        return steps_to_reach(curves.steps, curves.loss.mean(axis=0), loss)

    def state(self, name: str, field: str, start: float, end: float) -> np.ndarray:
        """A recorded field of the optimizer's state between two fractions of the run.

        Args:
          name: the optimizer.
          field: the field.
          start: fraction of the run at which the values begin, in [0, 1].
          end: fraction of the run at which they end.

        Returns:
          ``[S, W, ...]``, of at least one window.
        """
        values = self.curves[name].state[field]
        windows = values.shape[1]
        first = int(start * windows)
        return values[:, first : max(int(end * windows), first + 1)]

    def share_won(self, name: str, start: float, end: float) -> float:
        """Share of windows that the learned optimizer won, between two fractions of the run."""
        return float(self.state(name, "accepted", start, end).mean())

    def mean_alpha(self, name: str, base: str, start: float, end: float) -> float:
        """L3RS: mean weight of a base optimizer over seeds and layers, in a part of the run."""
        index = self.record.curves[name].bases.index(base)
        return float(self.state(name, "alpha", start, end)[..., index].mean())

    def meta_trainings(self, name: str) -> list[dict[str, np.ndarray]]:
        """The metrics of each meta-training of an optimizer; their labels are "NAME, seed N"."""
        runs = [run for label, run in self.training.items() if label.startswith(f"{name}, ")]
        if not runs:
            raise KeyError(name)
        return runs

    def held_out_losses(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(meta-updates, held-out losses) of each meta-training of an optimizer."""
        curves = []
        for run in self.meta_trainings(name):
            measured = np.isfinite(run["validation_loss"])
            curves.append((run["step"][measured], run["validation_loss"][measured]))
        return curves
