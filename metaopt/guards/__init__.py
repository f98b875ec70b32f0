"""Guards: learned optimizers that are never worse than a fallback, as optax transformations."""

from metaopt.core.rollouts import model_state as model_state
from metaopt.guards.core import GuardInfo as GuardInfo
from metaopt.guards.forms import Guard as Guard
from metaopt.guards.forms import GuardState as GuardState
from metaopt.guards.forms import in_windows as in_windows
from metaopt.guards.forms import info as info
from metaopt.guards.gl2o import GL2OState as GL2OState
from metaopt.guards.gl2o import gl2o as gl2o
from metaopt.guards.lgl2o import Adaptive as Adaptive
from metaopt.guards.lgl2o import average_memory as average_memory
from metaopt.guards.lgl2o import lgl2o as lgl2o
from metaopt.guards.meta_guards import amg as amg
from metaopt.guards.meta_guards import smg as smg
from metaopt.guards.race import race as race
from metaopt.guards.windows import windows as windows
