"""metaopt: learned optimizers that are safe to use."""

__version__ = "0.1.0"

from metaopt import guards as guards
from metaopt import meta as meta
from metaopt import optimizers as optimizers
from metaopt import tasks as tasks
from metaopt.base import LearnedOptimizer as LearnedOptimizer
from metaopt.base import Task as Task
from metaopt.base import TaskFamily as TaskFamily
from metaopt.base import single as single
from metaopt.checkpoints import CheckpointError as CheckpointError
from metaopt.checkpoints import Exported as Exported
from metaopt.checkpoints import load as load
from metaopt.checkpoints import save as save
from metaopt.guards import windows as windows
from metaopt.optimizers import load_velo as load_velo
from metaopt.rollouts import unroll as unroll
from metaopt.rollouts import windowed as windowed
from metaopt.train_state import TrainState as TrainState
