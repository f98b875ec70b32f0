"""Measures XLA's default options for CPU against `metaopt.core.cpu.fast`, on one core.

    python -m experiments.compiler_options

Needs MNIST and FashionMNIST (docs/data.md). Takes some minutes on one core. Times the meta-updates
of `experiments.population_forms`, compiled with both. Writes docs/results/bench-compiler.json:
seconds of each and their ratio, medians of seven rounds in which both are timed in turn;
docs/scaling.md quotes it.
"""

import os
from pathlib import Path
from unittest import mock

from experiments.population_forms import CASES, Form, compiled_update
from experiments.timing import keep_to_one_core, median_ratio, median_seconds, time_in_turn
from metaopt.core import cpu
from metaopt.evaluation.records import write_json
from metaopt.jobs.evaluate import environment

RESULT = Path("docs/results/bench-compiler.json")
ROUNDS = 7


def main() -> None:
    """Times all cases and writes the record."""
    keep_to_one_core()
    fast = cpu.fast()
    rows = []
    for case in CASES:
        updates = {}
        for name, options in {"xla": {}, "metaopt": fast}.items():
            with mock.patch.object(cpu, "fast", lambda options=options: options):
                updates[name] = compiled_update(case, Form())
        rounds = time_in_turn(updates, ROUNDS)
        ratio = median_ratio(rounds, "xla", reference="metaopt")
        rows.append({**case._asdict(), "seconds": median_seconds(rounds), "ratio": ratio})
        print(*case, f"{ratio:.2f}", flush=True)
    record = {
        "environment": environment("python -m experiments.compiler_options"),
        "load": os.getloadavg()[0],
        "options": fast,
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
