"""metaopt: learned optimizers that are safe to use.

Names are imported when they are first used, so that ``import metaopt`` is quick and a part of the
package that needs no JAX, such as `metaopt.report`, loads none.
"""

from typing import TYPE_CHECKING

from metaopt._version import __version__ as __version__
from metaopt.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from metaopt import datasets as datasets
    from metaopt import evaluation as evaluation
    from metaopt import guards as guards
    from metaopt import meta as meta
    from metaopt import optimizers as optimizers
    from metaopt import report as report
    from metaopt import tasks as tasks
    from metaopt import zoo as zoo
    from metaopt.core.rollouts import init_state as init_state
    from metaopt.core.rollouts import model_state as model_state
    from metaopt.core.rollouts import unroll as unroll
    from metaopt.core.rollouts import windowed as windowed
    from metaopt.core.types import LearnedOptimizer as LearnedOptimizer
    from metaopt.core.types import Task as Task
    from metaopt.core.types import TaskFamily as TaskFamily
    from metaopt.core.types import single as single
    from metaopt.evaluation.curves import evaluate as evaluate
    from metaopt.guards import windows as windows
    from metaopt.optimizers.train_state import TrainState as TrainState
    from metaopt.zoo.exports import CheckpointError as CheckpointError
    from metaopt.zoo.exports import Exported as Exported
    from metaopt.zoo.exports import load as load
    from metaopt.zoo.exports import load_published as load_published
    from metaopt.zoo.exports import save as save

_MODULES = ("datasets", "evaluation", "guards", "meta", "optimizers", "report", "tasks", "zoo")
_NAMES = {
    "LearnedOptimizer": "core.types",
    "Task": "core.types",
    "TaskFamily": "core.types",
    "single": "core.types",
    "init_state": "core.rollouts",
    "model_state": "core.rollouts",
    "unroll": "core.rollouts",
    "windowed": "core.rollouts",
    "evaluate": "evaluation.curves",
    "windows": "guards",
    "TrainState": "optimizers.train_state",
    "CheckpointError": "zoo.exports",
    "Exported": "zoo.exports",
    "load": "zoo.exports",
    "load_published": "zoo.exports",
    "save": "zoo.exports",
}

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {module: (module, "") for module in _MODULES}
    | {name: (module, name) for name, module in _NAMES.items()},
)
