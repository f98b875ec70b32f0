"""Optimizers on suites of tasks: curves, records, statistics, tuned baselines.

Names are imported when they are first used: records and statistics need no JAX.
"""

from typing import TYPE_CHECKING

from metaopt.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from metaopt.evaluation.baselines import BASELINES as BASELINES
    from metaopt.evaluation.baselines import Baseline as Baseline
    from metaopt.evaluation.baselines import chosen as chosen
    from metaopt.evaluation.curves import evaluate as evaluate
    from metaopt.evaluation.statistics import Interval as Interval
    from metaopt.evaluation.statistics import final_mean as final_mean
    from metaopt.evaluation.statistics import iqm_interval as iqm_interval
    from metaopt.evaluation.statistics import mean_interval as mean_interval
    from metaopt.evaluation.statistics import outcome as outcome
    from metaopt.evaluation.statistics import speedups as speedups
    from metaopt.evaluation.tuning import tune as tune

_NAMES = {
    "baselines": ("BASELINES", "Baseline", "chosen"),
    "curves": ("evaluate",),
    "statistics": (
        "Interval",
        "final_mean",
        "iqm_interval",
        "mean_interval",
        "outcome",
        "speedups",
    ),
    "tuning": ("tune",),
}

__getattr__, __dir__ = lazy_attributes(
    __name__, {name: (module, name) for module, names in _NAMES.items() for name in names}
)
