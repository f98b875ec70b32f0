"""Inner runs of a meta-update side by side or one after the other: which is faster on one core?

    python -m experiments.population_forms     # writes docs/results/bench-population.json

times meta-updates on one core, all forms in turn. Needs MNIST and FashionMNIST (docs/data.md).
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax

from benchmarks.workload import nes_config
from metaopt import meta, optimizers
from metaopt.core import cpu
from metaopt.evaluation.records import write_json
from metaopt.jobs.evaluate import environment
from metaopt.meta import devices
from metaopt.tasks import catalog

RESULT = Path("docs/results/bench-population.json")
LEARNED = {
    "L3RS": lambda: optimizers.l3rs(("sgd", "adam")),
    "VeLO 32/16": lambda: optimizers.velo(32, 16),
    "LSTM": lambda: optimizers.lstm(20),
}
ROUNDS = 3


class Case(NamedTuple):
    """Attributes: task, optimizer; population: 0 is tbptt; tasks, steps: of a meta-update."""

    task: str
    optimizer: str
    population: int
    tasks: int
    steps: int


CASES = (
    Case("spirals", "L3RS", 16, 4, 20),
    Case("digits", "L3RS", 16, 4, 20),
    Case("mnist-mlp20", "L3RS", 16, 4, 20),
    Case("mnist-mlp128x3", "L3RS", 8, 2, 10),
    Case("fashion-cnn3", "L3RS", 8, 2, 10),
    Case("digits", "VeLO 32/16", 16, 4, 20),
    Case("spirals", "LSTM", 16, 4, 20),
    Case("digits", "LSTM", 16, 4, 10),
    Case("mnist-mlp20", "LSTM", 4, 2, 10),
    Case("digits", "LSTM", 0, 4, 20),
)


class Form(NamedTuple):
    """Attributes: cores: that a device is taken to have; chunk: candidates at a time."""

    cores: float | None = None
    chunk: int = 0

    def applied(self) -> AbstractContextManager[Any]:
        """What makes the library take this form."""
        if self.cores is None:
            return nullcontext()
        return mock.patch.object(cpu, "cores_each", lambda: self.cores)


def forms(case: Case) -> dict[str, Form]:
    """Name -> form; the last is the library's choice."""
    found = {"side by side": Form(float("inf"))}
    if case.population:
        found["tasks one by one"] = Form(1, case.population)
        found["all one by one"] = Form(1, 1)
    return {**found, "as chosen": Form()}


def update(case: Case, form: Form) -> Callable[[], Any]:
    """A compiled meta-update, run once."""
    lopt, family = LEARNED[case.optimizer](), catalog.family(case.task)
    k_theta, k_task, k_step = jax.random.split(jax.random.key(0), 3)
    params = family.task(family.sample(k_task)).init(k_task)
    theta = lopt.init(k_theta, params)
    if case.population:
        config = nes_config(case.population, case.tasks, case.steps)
        trainer = meta.nes(lopt, family, config, devices.Spread(None, form.chunk))
    else:
        trainer = meta.tbptt(
            lopt, family, meta.TBPTTConfig(tasks=case.tasks, truncation=case.steps)
        )
    with form.applied():
        update = cpu.jit(meta.MetaTrainer.step)
        state = cpu.jit(meta.MetaTrainer.init)(trainer, k_theta, theta)
        jax.block_until_ready(update(trainer, k_step, state))
    return lambda: jax.block_until_ready(update(trainer, k_step, state))


def seconds(case: Case) -> dict[str, float]:
    """Of a meta-update, form by form: medians of rounds in which all are timed in turn."""
    updates = {name: update(case, form) for name, form in forms(case).items()}
    found: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(ROUNDS):
        for name, call in updates.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX counts the cores
    rows = []
    for case in CASES:
        found = seconds(case)
        rows.append({**case._asdict(), "seconds": found})
        speedups = [f"{name} {found['side by side'] / s:.2f}" for name, s in found.items()]
        print(*case, *speedups, flush=True)
    record = {
        "environment": environment("python -m experiments.population_forms"),
        "load": os.getloadavg()[0],
        "rows": rows,
    }
    write_json(RESULT, record)


if __name__ == "__main__":
    main()
