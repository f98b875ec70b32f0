"""Seeds side by side in one `vmap`, or one after the other: which is faster on this machine?

    python -m experiments.evaluation_forms     # writes docs/results/bench-curves.json

times evaluations of five seeds in both forms, in turn. Needs MNIST and FashionMNIST (docs/data.md).
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

RESULT = Path("docs/results/bench-curves.json")
FORMS = {"side by side": float("inf"), "one by one": 0}  # -> curves.LONG
CASES = (  # task, learned optimizer of the zoo or "" for SGD
    ("mnist-mlp20", ""),
    ("mnist-mlp20", "lstm-mlp-mnist"),
    ("fashion-cnn3", ""),
    ("fashion-cnn3", "lstm-cnn-fmnist"),
    ("finetune-A", "l3rs-finetune-cnn"),
    ("spirals-mlp20", "lstm-mlp-mnist"),
)
SEEDS, STEPS, ROUNDS = 5, 20, 5


def milliseconds(task: str, learned: str) -> dict[str, float]:
    """Per step and seed, form by form: medians of rounds in which both are timed in turn."""
    family, keys = catalog.family(task), jax.random.split(jax.random.key(0), SEEDS)
    tx = metaopt.load(learned).apply(num_steps=STEPS) if learned else optax.sgd(0.1)
    make = curves.Adjustable(lambda _: tx, lambda num_steps: ())  # compiled once per form
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form, long in FORMS.items():
            with mock.patch.object(curves, "LONG", long):
                run = curves.evaluate(make, family, num_steps=STEPS, keys=keys)
            seconds[form].append(float(run.seconds[-1]))
    return {form: 1e3 * statistics.median(found) / STEPS for form, found in seconds.items()}


def main() -> None:
    rows = []
    for task, learned in CASES:
        found = milliseconds(task, learned)
        rows.append({"task": task, "optimizer": learned or "sgd", "ms_per_step": found})
        print(rows[-1], flush=True)
    record = {
        "environment": environment("python -m experiments.evaluation_forms"),
        "load": os.getloadavg()[0],
        "seeds": SEEDS,
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
