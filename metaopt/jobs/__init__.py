"""The jobs behind the command line: meta-train and export; evaluate a suite and keep records."""

from metaopt.jobs.evaluating import evaluate_suite as evaluate_suite
from metaopt.jobs.meta_training import ended_as_begun as ended_as_begun
from metaopt.jobs.meta_training import meta_train as meta_train
from metaopt.jobs.processes import in_processes as in_processes
