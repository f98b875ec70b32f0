"""Runs a meta-training to its end: checkpoints, resuming, keep-best, metrics and progress."""

from metaopt.training.driver import train as train
from metaopt.training.folder import CONFIG as CONFIG
from metaopt.training.folder import LOCK as LOCK
from metaopt.training.logs import METRICS as METRICS
from metaopt.training.logs import read_metrics as read_metrics
from metaopt.training.logs import training_curves as training_curves
from metaopt.training.states import STATES as STATES
from metaopt.training.states import TrainState as TrainState
from metaopt.training.stopping import Terminated as Terminated
