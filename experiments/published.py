"""Measures the zoo's published optimizers beside tuned Adam, on several tasks and lengths of run.

    python -m experiments.published     # some minutes on 2 cores; resumes from runs/published

The cards of `celo` and `celo-adam` rest on it. Writes docs/results/celo/published.json: mean test
loss at the end (`metaopt.evaluation.statistics.final_mean`), and how many runs ended above their
start or at a loss that is not finite.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import metaopt
from metaopt.evaluation import contenders
from metaopt.evaluation.baselines import BASELINES
from metaopt.evaluation.comparing import ComparisonSettings, compare, task_id
from metaopt.evaluation.records import read_curves, read_record, write_json
from metaopt.evaluation.statistics import final_mean
from metaopt.evaluation.suites import SuiteTask

RUNS = Path("runs/published")
RECORD = Path("docs/results/celo/published.json")
NAMES = ("celo", "celo-adam")
TASKS = (
    ("digits", 100),
    ("digits", 1000),
    ("digits", 5000),
    ("digits-cnn", 300),
    ("moons-mlp20", 1000),
    ("fashion-mlp20", 300),
    ("fashion-mlp20", 2000),
    ("fashion-mlp128x2", 300),
)


def measure(number: int, task: str, num_steps: int, seeds: int) -> dict[str, Any]:
    """Runs tuned Adam and the published optimizers on one task.

    Args:
      number: of the task in `TASKS`.
      task: a name of `metaopt.tasks.catalog.TASKS`.
      num_steps: steps of each run.
      seeds: number of runs of each optimizer.

    Returns:
      ``{"task", "num_steps", "adam", "loss", "diverged"}``: the tuned setting of Adam, then
      name -> mean final test loss, and name -> number of diverged runs.
    """
    suite_task = SuiteTask(f"{task}, {num_steps} steps", task, num_steps)
    folder = RUNS / task_id(number, suite_task)
    learned = [contenders.from_export(name, metaopt.load(name)) for name in NAMES]
    compare(
        folder,
        suite_task,
        ["adam"],
        lambda makes: [
            *(contenders.baseline(BASELINES[n].label, make) for n, make in makes.items()),
            *map(contenders.plain, learned),
        ],
        ComparisonSettings(seeds=seeds),
    )
    record = read_record(folder)
    assert record is not None
    if record.left_out:
        raise RuntimeError(f"{task} cannot be measured: {record.left_out}")
    losses = {name: read_curves(folder / c.file).loss for name, c in record.curves.items()}
    return {
        "task": task,
        "num_steps": num_steps,
        "adam": record.tuned["Adam"]["point"],
        "loss": {name: float(final_mean(loss).mean()) for name, loss in losses.items()},
        "diverged": {
            name: int(np.sum(~(loss[:, -1] < loss[:, 0]))) for name, loss in losses.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all tasks and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each optimizer")
    args = parser.parse_args(argv)
    rows = []
    for number, (task, num_steps) in enumerate(TASKS):
        rows.append(measure(number, task, num_steps, args.seeds))
        print(rows[-1], flush=True)
        write_json(RECORD, {"seeds": args.seeds, "rows": rows})


if __name__ == "__main__":
    main()
