"""Speed of meta-training: NES and back-propagation against bare SGD, two processes against one.

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
from jax.sharding import Mesh
from rich.table import Table

from benchmarks.workload import LEARNED, Workload, bare_sgd, mlp_task, nes_generation, tbptt_window
from metaopt.core import cpu
from metaopt.meta import devices

ORIENTATION, SCALING = Workload(), Workload(population=8)
SCALING_ROUNDS = 3


def run(
    *,
    workload: Workload = ORIENTATION,
    scaling: Workload | None = SCALING,
    repeats: int = 5,
    generations: int = 10,
    names: Sequence[str] = tuple(LEARNED),
    windows: Sequence[str] = ("lstm",),
) -> dict[str, Any]:
    """Measures generations of NES, each interleaved with the same runs of SGD written by hand.

    On CPU every core becomes a device, as in `metaopt train`, unless JAX was used before.

    Args:
      workload: of a generation.
      scaling: of a generation by one process on one core, and by two on a core each (L3RS);
        None, or fewer than two cores: not measured.
      repeats: rounds per optimizer; ratios are formed within rounds, and their median reported.
      generations: timed by the processes of `scaling`, in each of three rounds.
      names: keys of `LEARNED`.
      windows: names of those that are also timed by truncated back-propagation: meta-updates of
        as many runs as a generation has, by a window of `TRUNCATION` steps.

    Returns:
      ``{"device", "threads", "workload", "repeats", "rows", "scaling"}``. A row has "optimizer",
      "inner_steps_per_s", "of_bare" (speed over that of the bare runs on one device),
      "of_bare_spread" (on the same devices), "trace_s", "compile_s", "program_mb" (memory that the
      compiled generation needs on a device). "scaling" is None or has
      "workload", "one_process" and "two_processes" (generations/s) and "ratio".
    """
    unknown = sorted({*names, *windows} - set(LEARNED))
    if unknown:
        raise ValueError(f"meta: no optimizer {unknown}; there are {sorted(LEARNED)}.")
    devices.initialise("none")
    task, key = mlp_task(workload), jax.random.key(0)
    mesh = devices.mesh_for(workload.population, workload.tasks)
    bares = {
        "bare SGD, one device": _compiled(bare_sgd(task, workload), None, key),
        "bare SGD": _compiled(bare_sgd(task, workload, mesh), mesh, key),
    }
    row = lambda name, program, steps: _row(
        name, (program, *bares.values()), (steps, workload.inner_steps), repeats
    )
    rows = [row(name, bare, workload.inner_steps) for name, bare in bares.items()]
    for name in names:
        step, *args = nes_generation(LEARNED[name](), task, workload, devices.Spread(mesh))
        generation = _compiled(step, mesh, *args, options=cpu.fast())
        rows.append(row(name, generation, workload.inner_steps))
    for name in windows:
        step, *args, steps = tbptt_window(LEARNED[name](), task, workload, mesh)
        window = _compiled(step, mesh, *args, options=cpu.fast())
        rows.append(row(f"{name}, TBPTT", window, steps))
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


def _compiled(
    fn: Callable[..., Any], mesh: Mesh | None, *args: Any, options: dict[str, Any] | None = None
) -> _Program:
    """`options`: of the compiler, as `metaopt train` has them; None: JAX's own."""
    where = devices.placed(devices.WHOLE, mesh) if mesh else None
    start = time.perf_counter()
    lowered = jax.jit(fn, out_shardings=where, compiler_options=options).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    program = _Program(lambda: compiled(*args), traced - start, end - traced, needed / 1e6)
    program.seconds()  # the first call is slower
    return program


def _row(
    name: str, programs: tuple[_Program, ...], steps: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """A row of the first of three programs; the others are the bare ones, by hand and spread.

    `steps`: inner steps of a call of the first, and of each of the others.
    """
    program, (own_steps, bare_steps) = programs[0], steps
    rounds = [[one.seconds() for one in programs] for _ in range(repeats)]
    more = own_steps / bare_steps
    return {
        "optimizer": name,
        "inner_steps_per_s": own_steps / statistics.median(own for own, *_ in rounds),
        "of_bare": more * statistics.median(hand / own for own, hand, _ in rounds),
        "of_bare_spread": more * statistics.median(spread / own for own, _, spread in rounds),
        "trace_s": program.trace_s,
        "compile_s": program.compile_s,
        "program_mb": program.megabytes,
    }


def _scaling(workload: Workload, cores: Sequence[int], generations: int) -> dict[str, Any]:
    """Medians of rounds in which one process and two are timed in turn."""
    speeds = lambda used: _generations_per_second(workload, used, generations)
    rounds = [(speeds(cores[:1]), speeds(cores)) for _ in range(SCALING_ROUNDS)]
    return {
        "workload": workload._asdict(),
        "one_process": statistics.median(one for one, _ in rounds),
        "two_processes": statistics.median(two for _, two in rounds),
        "ratio": statistics.median(two / one for one, two in rounds),
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
    step, trainer, bits, state = nes_generation(
        LEARNED["l3rs"](), mlp_task(workload), workload, spread
    )
    trainer = devices.replicated(trainer, mesh)
    step = devices.jit(step, mesh)
    state = devices.jit(lambda state: state, mesh)(state)  # where the next state will be
    state, _ = jax.block_until_ready(step(trainer, bits, state))
    start = time.perf_counter()
    for _ in range(generations):
        state, metrics = step(trainer, bits, state)
        jax.block_until_ready(metrics)
    results.put(time.perf_counter() - start)
    if count > 1:
        jax.distributed.shutdown()  # a child leaves without it; the first to go would end the other
