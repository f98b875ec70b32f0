"""The benchmark of guarded steps, at a small size: its record and table; nothing about speed."""

import json

import jax
import optax
import pytest
from rich.console import Console

from benchmarks import guards as bench
from metaopt import guards


@pytest.fixture(scope="module")
def record():
    return bench.run(repeats=1, steps=2, batch_size=4, pairs=(("dense", "AdamW"),))


def test_a_guarded_step_is_measured_against_the_step_without_a_guard(record):
    (row,) = record["rows"]
    assert row["network"] == "dense" and row["tensors"] == 6
    assert all(row[key] > 0 for key in ("step_ms", "running", "retired", "parts", "compile"))
    assert 1.0 <= row["state"] < 1.01  # the runners, and some numbers
    assert json.loads(json.dumps(record)) == record


def test_the_table_names_the_network(record):
    console = Console(width=160, record=True)
    console.print(bench.table(record))
    assert "dense, AdamW" in console.export_text()


def test_running_statistics_reach_the_guard():
    problem = bench.image_problem(bench.BatchNormResNet(), 4)
    guard = guards.race(optax.sgd(0.1), optax.sgd(0.1))
    step, _ = bench.guarded_step(problem, guard).run(1)
    statistics = guards.model_state(step.carry[1])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), statistics, problem.model_state)
    assert all(jax.tree.leaves(changed))
