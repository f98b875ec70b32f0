"""XLA's own options for CPU against `metaopt.core.cpu.fast`: meta-updates on one core.

    python -m experiments.compiler_options     # writes docs/results/bench-compiler.json

times the meta-updates of `experiments.population_forms` compiled in both ways, in turn. Needs MNIST
and FashionMNIST (docs/data.md).
"""

import os
import statistics
import time
from pathlib import Path
from unittest import mock

from experiments.population_forms import CASES, Form, update
from metaopt.core import cpu
from metaopt.evaluation.records import write_json
from metaopt.jobs.evaluate import environment

RESULT = Path("docs/results/bench-compiler.json")
ROUNDS = 7


def main() -> None:
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX counts the cores
    ways, rows = {"xla": {}, "metaopt": cpu.fast()}, []
    for case in CASES:
        calls = {}
        for way, options in ways.items():
            with mock.patch.object(cpu, "fast", lambda options=options: options):
                calls[way] = update(case, Form())
        rounds = []
        for _ in range(ROUNDS):
            seconds = {}
            for way, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[way] = time.perf_counter() - start
            rounds.append(seconds)
        ratio = statistics.median(each["xla"] / each["metaopt"] for each in rounds)
        of = {way: statistics.median(each[way] for each in rounds) for way in ways}
        rows.append({**case._asdict(), "seconds": of, "ratio": ratio})
        print(*case, f"{ratio:.2f}", flush=True)
    record = {
        "environment": environment("python -m experiments.compiler_options"),
        "load": os.getloadavg()[0],
        "options": ways["metaopt"],
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
