"""The benchmark of meta-training, at a small size: its record and table; nothing about speed."""

import json
import os
import queue

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import meta as bench
from benchmarks import workload
from metaopt import optimizers
from metaopt.meta import devices

TINY = workload.Workload(hidden=3, batch_size=4, population=2, tasks=2, num_steps=3)


@pytest.fixture(scope="module")
def record():
    """A record without the processes of the scaling part, which would mostly compile."""
    speeds = {1: 2.0, 2: 3.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "LEARNED", {"l3rs": lambda: optimizers.l3rs(("sgd",))})
        patch.setattr(bench, "_generations_per_second", lambda w, cores, n: speeds[len(cores)])
        patch.setattr(os, "sched_getaffinity", lambda process: {4, 7}, raising=False)
        return bench.run(workload=TINY, scaling=TINY, repeats=2, names=("l3rs",), windows=("l3rs",))


def test_every_optimizer_is_measured_next_to_bare_sgd(record):
    names = ["bare SGD, one device", "bare SGD", "l3rs", "l3rs, TBPTT"]
    assert [row["optimizer"] for row in record["rows"]] == names
    for row in record["rows"]:
        assert min(value for name, value in row.items() if name != "optimizer") > 0
    assert record["workload"]["num_steps"] == 3 and TINY.inner_steps == 2 * 2 * 3
    assert json.loads(json.dumps(record)) == record


def test_one_process_is_compared_with_two(record):
    measured = {"one_process": 2.0, "two_processes": 3.0, "ratio": 1.5}
    assert record["scaling"] == {"workload": record["workload"], **measured}


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="processes cannot be kept to cores"
)
def test_a_worker_times_its_generations_on_its_core(monkeypatch):
    monkeypatch.setattr(bench, "LEARNED", {"l3rs": lambda: optimizers.l3rs(("sgd",))})
    core = min(os.sched_getaffinity(0))
    affinities = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda *arguments: affinities.append(arguments))
    results = queue.SimpleQueue()
    bench._worker(
        workload=TINY,
        address="unused",
        core=core,
        count=1,
        index=0,
        generations=2,
        results=results,
    )
    assert affinities == [(0, {core})]
    assert results.get() > 0


def test_the_table_names_every_optimizer_and_the_ratio(record):
    console = Console(width=140, record=True)
    console.print(bench.table(record))
    text = " ".join(console.export_text().split())
    words = ("784-3-10", "bare SGD", "l3rs", "of bare", "2 processes 3.00; ratio 1.50")
    assert all(word in text for word in words)


def test_the_bare_runs_are_plain_sgd():
    """The first candidate on the first task equals a loop over the task's own mini-batches."""
    task = workload.mlp_task(TINY)
    losses = workload.bare_sgd(task, TINY)(jax.random.key(5))
    k_init, k_train, k_eval = jax.random.split(jax.random.split(jax.random.key(5), 2)[0], 3)
    params, gradient, sample = (
        task.init(k_init),
        jax.jit(jax.grad(task.loss)),
        jax.jit(task.sample, static_argnums=(1, 2)),
    )
    for t in range(3):
        grads = gradient(params, sample(jax.random.fold_in(k_train, t), (), "train"))
        params = jax.tree.map(lambda p, g: p - np.float32(0.05) * g, params, grads)
    assert losses.shape == (2, 2)
    mesh = devices.mesh_for(2, 2, jax.devices()[:1])
    np.testing.assert_allclose(
        workload.bare_sgd(task, TINY, mesh)(jax.random.key(5)), losses, rtol=1e-5
    )
    batch = sample(k_eval, (1,), "valid")
    expected = task.loss(params, jax.tree.map(lambda a: a[0], batch))
    np.testing.assert_allclose(losses[0, 0], expected, rtol=1e-5)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"no optimizer \['adem'\]; there are"):
        bench.run(names=("adem",))
