"""Guards: learned optimizers that are never worse than a fallback, as optax transformations."""

from metaopt.guards.core import Guard as Guard
from metaopt.guards.core import GuardInfo as GuardInfo
from metaopt.guards.gl2o import GL2OState as GL2OState
from metaopt.guards.gl2o import gl2o as gl2o
from metaopt.guards.lgl2o import Adaptive as Adaptive
from metaopt.guards.lgl2o import LGL2OState as LGL2OState
from metaopt.guards.lgl2o import average_memory as average_memory
from metaopt.guards.lgl2o import lgl2o as lgl2o
from metaopt.guards.meta_guards import MetaGuardState as MetaGuardState
from metaopt.guards.meta_guards import amg as amg
from metaopt.guards.meta_guards import smg as smg
from metaopt.guards.race import RaceState as RaceState
from metaopt.guards.race import race as race
from metaopt.guards.streaming import StreamingState as StreamingState
from metaopt.guards.streaming import streaming as streaming
from metaopt.guards.windows import windows as windows
