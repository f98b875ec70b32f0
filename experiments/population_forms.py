"""Measures inner runs of a meta-update side by side and one after the other, on one core.

    python -m experiments.population_forms

Needs MNIST and FashionMNIST (docs/data.md). Takes some minutes on one core. Writes
docs/results/bench-population.json: seconds of a meta-update in every form, medians of three rounds
in which all forms are timed in turn; docs/scaling.md quotes it.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax

from benchmarks.workload import nes_config
from experiments.timing import keep_to_one_core, median_seconds, time_in_turn
from metaopt import meta, optimizers
from metaopt.core import cpu
from metaopt.evaluation.records import write_json
from metaopt.jobs.evaluate import environment
from metaopt.meta import devices
from metaopt.tasks import catalog

RESULT = Path("docs/results/bench-population.json")
ROUNDS = 3
LEARNED = {
    "L3RS": lambda: optimizers.l3rs(("sgd", "adam")),
    "VeLO 32/16": lambda: optimizers.velo(32, 16),
    "LSTM": lambda: optimizers.lstm(20),
}


class Case(NamedTuple):
    """A meta-update that is timed.

    Attributes:
      task: a name in `metaopt.tasks.catalog.TASKS`.
      optimizer: a key of `LEARNED`.
      population: candidates of NES; 0: truncated back-propagation.
      tasks: tasks of NES, or runs of truncated back-propagation.
      steps: steps of an inner run, or of a window.
    """

    task: str
    optimizer: str
    population: int
    tasks: int
    steps: int


CASES = (
    Case(task="spirals", optimizer="L3RS", population=16, tasks=4, steps=20),
    Case(task="digits", optimizer="L3RS", population=16, tasks=4, steps=20),
    Case(task="mnist-mlp20", optimizer="L3RS", population=16, tasks=4, steps=20),
    Case(task="mnist-mlp128x3", optimizer="L3RS", population=8, tasks=2, steps=10),
    Case(task="fashion-cnn3", optimizer="L3RS", population=8, tasks=2, steps=10),
    Case(task="digits", optimizer="VeLO 32/16", population=16, tasks=4, steps=20),
    Case(task="spirals", optimizer="LSTM", population=16, tasks=4, steps=20),
    Case(task="digits", optimizer="LSTM", population=16, tasks=4, steps=10),
    Case(task="mnist-mlp20", optimizer="LSTM", population=4, tasks=2, steps=10),
    Case(task="digits", optimizer="LSTM", population=0, tasks=4, steps=20),
)


class Form(NamedTuple):
    """How the inner runs are computed; the default is the library's choice.

    Attributes:
      cores: cores that the library believes a device has; None: as many as it has.
      chunk: candidates at a time; 0: the library's choice.
    """

    cores: float | None = None
    chunk: int = 0

    def applied(self) -> AbstractContextManager[Any]:
        """A context in which the library takes this form."""
        if self.cores is None:
            return nullcontext()
        return mock.patch.object(cpu, "cores_each", lambda: self.cores)


def forms(case: Case) -> dict[str, Form]:
    """The forms that a case is timed in, by name."""
    nes_only = {
        "tasks one by one": Form(cores=1, chunk=case.population),
        "all one by one": Form(cores=1, chunk=1),
    }
    return {
        "side by side": Form(cores=float("inf")),
        **(nes_only if case.population else {}),
        "as chosen": Form(),
    }


def compiled_update(case: Case, form: Form) -> Callable[[], Any]:
    """A meta-update that is compiled and has run once."""
    lopt, family = LEARNED[case.optimizer](), catalog.family(case.task)
    k_theta, k_task, k_step = jax.random.split(jax.random.key(0), 3)
    params = family.task(family.sample(k_task)).init(k_task)
    theta = lopt.init(k_theta, params)
    if case.population:
        config = nes_config(case.population, case.tasks, case.steps)
        trainer = meta.nes(lopt, family, config, devices.Spread(None, form.chunk))
    else:
        config = meta.TBPTTConfig(tasks=case.tasks, truncation=case.steps)
        trainer = meta.tbptt(lopt, family, config)
    with form.applied():
        update = cpu.jit(meta.MetaTrainer.step)
        state = cpu.jit(meta.MetaTrainer.init)(trainer, k_theta, theta)
        jax.block_until_ready(update(trainer, k_step, state))
    return lambda: jax.block_until_ready(update(trainer, k_step, state))


def main() -> None:
    """Times all cases and writes the record."""
    keep_to_one_core()
    rows = []
    for case in CASES:
        updates = {name: compiled_update(case, form) for name, form in forms(case).items()}
        seconds = median_seconds(time_in_turn(updates, ROUNDS))
        rows.append({**case._asdict(), "seconds": seconds})
        speedups = [f"{name} {seconds['side by side'] / s:.2f}" for name, s in seconds.items()]
        print(*case, *speedups, flush=True)
    record = {
        "environment": environment("python -m experiments.population_forms"),
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
