"""Measures the seeds of an evaluation side by side in one `vmap`, and one after the other.

    python -m experiments.evaluation_forms

Needs MNIST and FashionMNIST (docs/data.md). Takes some minutes on one core. Writes
docs/results/bench-evaluation.json: milliseconds per step and seed of both forms, medians of five
rounds in which both are timed in turn; docs/scaling.md quotes it.
"""

import os
import statistics
from pathlib import Path
from unittest import mock

import jax
import optax

import metaopt
from metaopt.evaluation import curves
from metaopt.evaluation.records import write_json
from metaopt.jobs.evaluate import environment
from metaopt.tasks import catalog

RESULT = Path("docs/results/bench-evaluation.json")
SEEDS = 5
STEPS = 20
ROUNDS = 5
FORMS = {"side by side": float("inf"), "one by one": 0}  # -> the threshold `curves.LONG`
CASES = (  # (task, learned optimizer in the zoo or "" for SGD)
    ("mnist-mlp20", ""),
    ("mnist-mlp20", "lstm-mlp-mnist"),
    ("fashion-cnn3", ""),
    ("fashion-cnn3", "lstm-cnn-fmnist"),
    ("finetune-A", "l3rs-finetune-cnn"),
    ("spirals-mlp20", "lstm-mlp-mnist"),
)


def milliseconds_per_step(task: str, learned: str) -> dict[str, float]:
    """Times both forms in turn; the result is per step and seed."""
    family = catalog.family(task)
    keys = jax.random.split(jax.random.key(0), SEEDS)
    tx = metaopt.load(learned).apply(num_steps=STEPS) if learned else optax.sgd(0.1)
    make = curves.Adjustable(lambda _: tx, lambda num_steps: ())  # compiled once per form
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form, threshold in FORMS.items():
            with mock.patch.object(curves, "LONG", threshold):
                run = curves.evaluate(make, family, num_steps=STEPS, keys=keys)
            seconds[form].append(float(run.seconds[-1]))
    return {form: 1e3 * statistics.median(times) / STEPS for form, times in seconds.items()}


def main() -> None:
    """Times all cases and writes the record."""
    rows = []
    for task, learned in CASES:
        row = {
            "task": task,
            "optimizer": learned or "sgd",
            "ms_per_step": milliseconds_per_step(task, learned),
        }
        rows.append(row)
        print(row, flush=True)
    record = {
        "environment": environment("python -m experiments.evaluation_forms"),
        "load": os.getloadavg()[0],
        "seeds": SEEDS,
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
