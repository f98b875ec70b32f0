"""Runs a meta-training to its end: checkpoints, resuming, keep-best, metrics and progress."""

from metaopt.core.extras import optional_imports

with optional_imports("train", needed_by="metaopt.meta.loop"):
    from metaopt.meta.loop.driver import train as train
    from metaopt.meta.loop.folder import CONFIG as CONFIG
    from metaopt.meta.loop.folder import EXPORT as EXPORT
    from metaopt.meta.loop.folder import WARM_START as WARM_START
    from metaopt.meta.loop.logs import METRICS as METRICS
    from metaopt.meta.loop.logs import read_metrics as read_metrics
    from metaopt.meta.loop.logs import training_curves as training_curves
    from metaopt.meta.loop.states import STATES as STATES
    from metaopt.meta.loop.states import RunState as RunState
    from metaopt.meta.loop.stopping import Terminated as Terminated
