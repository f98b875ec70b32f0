"""After how many jobs a meta-training has paid for itself. Imports no JAX."""

from typing import NamedTuple

import numpy as np

from metaopt.evaluation.statistics import cost_to_reach, final_mean, iqm, speedups
from metaopt.report.summary import Evaluation, TaskData, best_baseline

CHARGES = {"inner_steps": "grad_evals", "seconds": "seconds"}  # of a meta-training -> of a run


class BreakEven(NamedTuple):
    """A meta-trained optimizer beside a rival, charged in one of two ways.

    A job is one run on one of the tasks of the evaluation. What a meta-trained optimizer saves in a
    job is what its rival needs to reach its own final loss, less what the optimizer needs for it,
    plus the rival's grid search, if it is tuned for each job.

    Attributes:
      optimizer: the meta-trained optimizer.
      rival: what it is compared with.
      tuned: whether the rival is tuned anew for each job, and this search is charged.
      charge: "inner_steps": gradients of mini-batches; "seconds": wall-clock time.
      spent: cost of the meta-training, beyond that of the rival; positive.
      saved: mean saving per job; negative if the optimizer costs more than its rival.
    """

    optimizer: str
    rival: str
    tuned: bool
    charge: str
    spent: float
    saved: float

    @property
    def jobs(self) -> float:
        """Number of jobs after which the meta-training has paid; inf if it never does."""
        return self.spent / self.saved if self.saved > 0 else np.inf


def break_evens(evaluation: Evaluation) -> list[BreakEven]:
    """All meta-trained optimizers of known cost, beside the best baseline and cheaper ones.

    The best baseline is that of `metaopt.report.summary.best_baseline`. A meta-trained optimizer
    of lower cost, for example a mere search for learning rates, is a rival without a search.
    """
    spent = evaluation.index.get("training_cost", {})
    learned = {
        name
        for task in evaluation.tasks
        for name, entry in task.record.curves.items()
        if entry.kind == "learned" and name in spent
    }
    best, found = best_baseline(evaluation.tasks), []
    for name in sorted(learned):
        rivals = [(best, True)] if best else []
        rivals += [(other, False) for other in sorted(learned - {name})]
        for rival, tuned in rivals:
            for charge, field in CHARGES.items():
                difference = spent[name][charge] - (0 if tuned else spent[rival][charge])
                if difference <= 0:
                    continue
                saved = _saved(evaluation.tasks, name, rival, tuned, field)
                if saved is not None:
                    found.append(BreakEven(name, rival, tuned, charge, difference, saved))
    return found


def _saved(tasks: list[TaskData], name: str, rival: str, tuned: bool, field: str) -> float | None:
    """Mean saving per job, in the cost `field` of curves; None without a common task."""
    needed, factors, searches = [], [], []
    for task in tasks:
        if name not in task.curves or rival not in task.curves:
            continue
        if tuned and rival not in task.record.tuned:
            continue
        own, theirs = task.curves[name], task.curves[rival]
        scores = speedups(getattr(theirs, field), theirs.loss, getattr(own, field), own.loss)
        kept = ~np.isnan(scores)
        if not kept.any():
            continue
        factors.append(scores[kept])
        needed += [
            cost_to_reach(getattr(theirs, field), loss, float(final))
            for loss, final in zip(theirs.loss[kept], final_mean(theirs.loss)[kept], strict=True)
        ]
        if tuned:
            searches.append(float(task.record.tuned[rival][field]))
    if not factors:
        return None
    factor = float(iqm(factors))
    without = float(np.mean(needed))
    with_it = without / factor if factor > 0 else np.inf
    return without - with_it + (float(np.mean(searches)) if searches else 0.0)
