"""The jobs behind the command line: meta-train and export; evaluate a suite and keep records."""

from metaopt.core.extras import optional_imports

with optional_imports("train", needed_by="metaopt.jobs"):
    from metaopt.core.processes import in_processes as in_processes
    from metaopt.jobs.evaluate import evaluate_suite as evaluate_suite
    from metaopt.jobs.train import ended_as_begun as ended_as_begun
    from metaopt.jobs.train import meta_train as meta_train
