"""Speed of meta-training: generations of NES against bare SGD runs, and two processes against one.

Bare runs are timed on one device, as one writes them by hand, and on those of the generations.

The work of a generation is that of a published orientation: an MLP 784-32-10, mini-batches of 128,
8 tasks, 2 antithetic candidates, 50 steps. On 2 CPU cores the field's reference framework does
about 700 inner steps/s of it with a 197-parameter optimizer (9 to 20 s of compilation), and 154
with VeLO.
"""

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from rich.table import Table

from metaopt import devices, meta, optimizers
from metaopt.base import LearnedOptimizer, Task, single
from metaopt.benchmarks.guards import images
from metaopt.networks import MLP
from metaopt.rollouts import mean_loss
from metaopt.tasks import classification

LEARNED: dict[str, Callable[[], LearnedOptimizer]] = {
    "l3rs": lambda: optimizers.l3rs(("sgd", "adam")),
    "lstm": lambda: optimizers.lstm(20),
    "velo": lambda: optimizers.velo(512, 256),
}


class Workload(NamedTuple):
    """A generation.

    Attributes: hidden: units of the MLP's hidden layer; batch_size; population: candidates;
    tasks: inner runs of each; num_steps: of an inner run.
    """

    hidden: int = 32
    batch_size: int = 128
    population: int = 2
    tasks: int = 8
    num_steps: int = 50

    @property
    def inner_steps(self) -> int:
        """Optimizee steps of a generation."""
        return self.population * self.tasks * self.num_steps


ORIENTATION, SCALING = Workload(), Workload(population=8)


def run(
    *,
    workload: Workload = ORIENTATION,
    scaling: Workload | None = SCALING,
    repeats: int = 5,
    generations: int = 5,
    names: Sequence[str] = tuple(LEARNED),
) -> dict[str, Any]:
    """Measures generations of NES, each interleaved with the same runs of SGD written by hand.

    On CPU every core becomes a device, as in `metaopt train`, unless JAX was used before.

    Args:
      workload: of a generation.
      scaling: of a generation by one process on one core, and by two on a core each (L3RS);
        None, or fewer than two cores: not measured.
      repeats: rounds per optimizer; ratios are formed within rounds, and their median reported.
      generations: timed by the processes of `scaling`.
      names: keys of `LEARNED`.

    Returns:
      ``{"device", "threads", "workload", "repeats", "rows", "scaling"}``. A row has "optimizer",
      "inner_steps_per_s", "of_bare" (speed over that of the bare runs on one device),
      "of_bare_spread" (on the same devices), "trace_s", "compile_s", "program_mb" (memory that the
      compiled generation needs on a device). "scaling" is None or has
      "workload", "one_process" and "two_processes" (generations/s) and "ratio".
    """
    unknown = sorted(set(names) - set(LEARNED))
    if unknown:
        raise ValueError(f"meta: no optimizer {unknown}; there are {sorted(LEARNED)}.")
    devices.initialise("none")
    task, key = _task(workload), jax.random.key(0)
    mesh = devices.mesh_for(workload.population, workload.tasks)
    bares = {
        "bare SGD, one device": _compiled(_bare(task, workload), None, key),
        "bare SGD": _compiled(_bare(task, workload, mesh), mesh, key),
    }
    row = lambda name, program: _row(name, (program, *bares.values()), workload, repeats)
    rows = [row(name, bare) for name, bare in bares.items()]
    for name in names:
        step, bits, state = _generation(LEARNED[name](), task, workload, devices.Spread(mesh))
        generation = _compiled(step, mesh, bits, state)
        rows.append(row(name, generation))
    device = jax.devices()[0]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {
        "device": f"{jax.device_count()} x {device.platform}: {device.device_kind}",
        "threads": os.cpu_count(),
        "workload": workload._asdict(),
        "repeats": repeats,
        "rows": rows,
        "scaling": _scaling(scaling, cores[:2], generations) if scaling and cores[1:] else None,
    }


def table(record: dict[str, Any]) -> Table:
    """A record of `run` for people."""
    of = record["workload"]
    table = Table(
        title=f"A generation: {of['population']} candidates x {of['tasks']} tasks x "
        f"{of['num_steps']} steps, MLP 784-{of['hidden']}-10, batch {of['batch_size']}; "
        f"{record['device']}, {record['threads']} threads"
    )
    columns = ("optimizer", "inner steps/s", "of bare, one device", "of bare", "trace s")
    columns += ("compile s", "program MB")
    for column in columns:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in record["rows"]:
        table.add_row(
            row["optimizer"],
            f"{row['inner_steps_per_s']:,.0f}",
            f"{row['of_bare']:.2f}",
            f"{row['of_bare_spread']:.2f}",
            f"{row['trace_s']:.1f}",
            f"{row['compile_s']:.1f}",
            f"{row['program_mb']:.1f}",
        )
    if scaling := record["scaling"]:
        table.caption = (
            f"generations/s with {scaling['workload']['population']} candidates on one core each: "
            f"1 process {scaling['one_process']:.2f}, 2 processes {scaling['two_processes']:.2f}; "
            f"ratio {scaling['ratio']:.2f}"
        )
    return table


def _task(workload: Workload) -> Task:
    return classification(MLP((workload.hidden, 10)), images(), batch_size=workload.batch_size)


def _generation(
    lopt: LearnedOptimizer, task: Task, workload: Workload, spread=devices.EVERYTHING_HERE
):
    """(step, key, state) of NES."""
    theta = lopt.init(jax.random.key(0), task.init(jax.random.key(1)))
    config = meta.NESConfig(
        population=workload.population,
        tasks=workload.tasks,
        min_steps=workload.num_steps,
        max_steps=workload.num_steps,
        eval_batches=1,
    )
    trainer = meta.nes(lopt, single(task), theta, config, spread)
    state = jax.tree.map(np.asarray, trainer.init(jax.random.key(2), theta))
    bits = np.asarray(jax.random.key_data(jax.random.key(3)))
    return lambda bits, state: trainer.step(jax.random.wrap_key_data(bits), state), bits, state


def _bare(task: Task, workload: Workload, mesh: Mesh | None = None):
    """``key -> losses [population, tasks]`` of SGD with one step size per candidate, by hand."""

    def one_run(rate, key):
        k_init, k_train, k_eval = jax.random.split(key, 3)

        def step(params, t):
            batch = task.sample(jax.random.fold_in(k_train, t), ())
            value, grads = jax.value_and_grad(task.loss)(params, batch)
            return jax.tree.map(lambda p, g: p - rate * g, params, grads), value

        params, _ = jax.lax.scan(step, task.init(k_init), jnp.arange(workload.num_steps))
        return mean_loss(task.loss, params, task.sample(k_eval, (1,), "valid"))

    runs = jax.vmap(jax.vmap(one_run, in_axes=(None, 0)), in_axes=(0, None))

    def losses(key):
        rates = jnp.linspace(0.05, 0.1, workload.population)
        return shared_out(rates, jax.random.split(key, workload.tasks))

    by_candidate, by_task = map(PartitionSpec, (devices.POPULATION, devices.TASK))
    both = PartitionSpec(devices.POPULATION, devices.TASK)
    shared_out = devices.over_runs(runs, mesh, (by_candidate, by_task), both)
    return losses


class _Program(NamedTuple):
    """Attributes: call: runs it once; trace_s, compile_s: what it took; megabytes: it needs."""

    call: Callable[[], Any]
    trace_s: float
    compile_s: float
    megabytes: float

    def seconds(self) -> float:
        """Of one call."""
        start = time.perf_counter()
        jax.block_until_ready(self.call())
        return time.perf_counter() - start


def _compiled(fn: Callable[..., Any], mesh: Mesh | None, *args: Any) -> _Program:
    where = devices.placed(devices.WHOLE, mesh) if mesh else None
    start = time.perf_counter()
    lowered = jax.jit(fn, out_shardings=where).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    program = _Program(lambda: compiled(*args), traced - start, end - traced, needed / 1e6)
    program.seconds()  # the first call is slower
    return program


def _row(
    name: str, programs: tuple[_Program, ...], workload: Workload, repeats: int
) -> dict[str, Any]:
    """A row of the first of three programs; the others are the bare ones, by hand and spread."""
    program = programs[0]
    rounds = [[one.seconds() for one in programs] for _ in range(repeats)]
    return {
        "optimizer": name,
        "inner_steps_per_s": workload.inner_steps / statistics.median(own for own, *_ in rounds),
        "of_bare": statistics.median(hand / own for own, hand, _ in rounds),
        "of_bare_spread": statistics.median(spread / own for own, _, spread in rounds),
        "trace_s": program.trace_s,
        "compile_s": program.compile_s,
        "program_mb": program.megabytes,
    }


def _scaling(workload: Workload, cores: Sequence[int], generations: int) -> dict[str, Any]:
    one = _generations_per_second(workload, cores[:1], generations)
    two = _generations_per_second(workload, cores, generations)
    return {
        "workload": workload._asdict(),
        "one_process": one,
        "two_processes": two,
        "ratio": two / one,
    }


def _generations_per_second(workload: Workload, cores: Sequence[int], generations: int) -> float:
    """Of one training by as many processes as there are cores, each on its own."""
    context = get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    results = context.SimpleQueue()
    workers = [
        context.Process(
            target=_worker,
            args=(workload, address, core, len(cores), index, generations, results),
            daemon=True,
        )
        for index, core in enumerate(cores)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise RuntimeError(f"meta: processes of the benchmark ended with {failed}.")
    return generations / max(results.get() for _ in workers)


def _worker(
    workload: Workload,
    address: str,
    core: int,
    count: int,
    index: int,
    generations: int,
    results: Any,
) -> None:
    os.sched_setaffinity(0, {core})  # before JAX counts the cores
    if count > 1:
        devices.initialise(address, count, index)
    mesh = devices.mesh_for(workload.population, workload.tasks)
    spread = devices.Spread(mesh)
    step, bits, state = _generation(LEARNED["l3rs"](), _task(workload), workload, spread)
    compiled = devices.compiler(mesh)
    step, state = compiled(step), compiled(lambda state: state)(state)  # where the next will be
    state, _ = jax.block_until_ready(step(bits, state))
    start = time.perf_counter()
    for _ in range(generations):
        state, metrics = step(bits, state)
        jax.block_until_ready(metrics)
    results.put(time.perf_counter() - start)
    if count > 1:
        jax.distributed.shutdown()  # a child leaves without it; the first to go would end the other
