"""Speed of meta-training: against bare SGD, and two processes against one.

Measured: inner steps per second of one generation of NES and of one window of truncated
back-propagation, with their trace time, compile time and memory.
Reference: the same inner runs with SGD written by hand ("bare"), on one device and on all devices
that the generation uses. A round times all in turn, and ratios are formed within rounds.

Measured too: generations per second of two processes with one core each. Reference: one process on
one core.

A generation is an MLP 784-32-10, mini-batches of 128, 8 tasks, 2 antithetic candidates and 50
steps. This is a published orientation: on 2 CPU cores the field's reference framework does about
700 inner steps/s of it with a 197-parameter optimizer (9 to 20 s of compilation), and 154 with
VeLO.

    python -m benchmarks meta [--out FILE]     # a few minutes on 2 cores
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

from benchmarks.workload import (
    LEARNED,
    MetaUpdate,
    Workload,
    bare_sgd,
    mlp_task,
    nes_generation,
    tbptt_window,
)
from metaopt.core import cpu
from metaopt.meta import devices

ORIENTATION = Workload()
SCALING = Workload(population=8)
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
    """Measures meta-updates, each interleaved with the same runs of SGD written by hand.

    On CPU every core becomes a device, as in `metaopt train`, unless JAX was used before.

    Args:
      workload: the generation.
      scaling: the generation that one process on one core, and two processes on one core each, are
        timed with (L3RS). None: not measured; nor with fewer than two cores.
      repeats: rounds per optimizer.
      generations: generations that the processes of `scaling` take in each of three rounds.
      names: keys of `LEARNED`: optimizers that are timed with NES.
      windows: keys of `LEARNED`: optimizers that are timed with truncated back-propagation too. A
        meta-update has as many runs as a generation, and a window of `TRUNCATION` steps.

    Returns:
      ``{"device", "threads", "workload", "repeats", "rows", "scaling"}``. A row has "optimizer",
      "inner_steps_per_s", "of_bare" (speed over that of the bare runs on one device),
      "of_bare_spread" (over that of the bare runs on the same devices), "trace_s", "compile_s" and
      "program_mb" (memory that the compiled program needs on a device). "scaling" is None or has
      "workload", "one_process" and "two_processes" (generations/s) and "ratio".

    Raises:
      ValueError: when a name is not a key of `LEARNED`.
    """
    unknown = sorted({*names, *windows} - set(LEARNED))
    if unknown:
        raise ValueError(f"meta: no optimizer {unknown}; there are {sorted(LEARNED)}.")
    devices.initialise("none")
    task = mlp_task(workload)
    mesh = devices.mesh_for(workload.population, workload.tasks)
    key = jax.random.key(0)
    bare = _Bare(
        one_device=_compiled(bare_sgd(task, workload), key, mesh=None),
        same_devices=_compiled(bare_sgd(task, workload, mesh), key, mesh=mesh),
        inner_steps=workload.inner_steps,
    )

    def row(name: str, program: _Program, inner_steps: int) -> dict[str, Any]:
        return _row(name, program, inner_steps=inner_steps, bare=bare, repeats=repeats)

    rows = [
        row("bare SGD, one device", bare.one_device, workload.inner_steps),
        row("bare SGD", bare.same_devices, workload.inner_steps),
    ]
    for name in names:
        update = nes_generation(LEARNED[name](), task, workload, devices.Spread(mesh))
        rows.append(row(name, _compiled_update(update, mesh), update.inner_steps))
    for name in windows:
        update = tbptt_window(LEARNED[name](), task, workload, mesh)
        rows.append(row(f"{name}, TBPTT", _compiled_update(update, mesh), update.inner_steps))
    device = jax.devices()[0]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    scaling_record = None
    if scaling is not None and len(cores) >= 2:
        scaling_record = _scaling(scaling, cores[:2], generations)
    return {
        "device": f"{jax.device_count()} x {device.platform}: {device.device_kind}",
        "threads": os.cpu_count(),
        "workload": workload._asdict(),
        "repeats": repeats,
        "rows": rows,
        "scaling": scaling_record,
    }


def table(record: dict[str, Any]) -> Table:
    """Renders a record of `run`."""
    workload = record["workload"]
    table = Table(
        title=f"A generation: {workload['population']} candidates x {workload['tasks']} tasks x "
        f"{workload['num_steps']} steps, MLP 784-{workload['hidden']}-10, "
        f"batch {workload['batch_size']}; {record['device']}, {record['threads']} threads"
    )
    table.add_column("optimizer")
    for column in (
        "inner steps/s",
        "of bare, one device",
        "of bare",
        "trace s",
        "compile s",
        "program MB",
    ):
        table.add_column(column, justify="right")
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
    """A compiled program.

    Attributes:
      call: runs it once.
      trace_s: seconds of tracing.
      compile_s: seconds of compilation.
      megabytes: memory that it needs on a device.
    """

    call: Callable[[], Any]
    trace_s: float
    compile_s: float
    megabytes: float

    def seconds(self) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        jax.block_until_ready(self.call())
        return time.perf_counter() - start


class _Bare(NamedTuple):
    """The reference.

    Attributes:
      one_device: all runs on one device.
      same_devices: the runs shared by the devices that a generation uses.
      inner_steps: optimizee steps of a call of either.
    """

    one_device: _Program
    same_devices: _Program
    inner_steps: int


def _compiled(
    fn: Callable[..., Any],
    *args: Any,
    mesh: Mesh | None,
    compiler_options: dict[str, Any] | None = None,
) -> _Program:
    """Compiles `fn` and calls it once, since the first call is slower."""
    out_shardings = devices.placed(devices.WHOLE, mesh) if mesh else None
    jitted = jax.jit(fn, out_shardings=out_shardings, compiler_options=compiler_options)
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory: Any = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    program = _Program(
        call=lambda: compiled(*args),
        trace_s=traced - start,
        compile_s=end - traced,
        megabytes=needed / 1e6,
    )
    program.seconds()
    return program


def _compiled_update(update: MetaUpdate, mesh: Mesh) -> _Program:
    """A meta-update with the compiler options of `metaopt train`."""
    return _compiled(
        update.step,
        update.trainer,
        update.key_data,
        update.state,
        mesh=mesh,
        compiler_options=cpu.fast(),
    )


def _row(
    name: str, program: _Program, *, inner_steps: int, bare: _Bare, repeats: int
) -> dict[str, Any]:
    """Times a program, of `inner_steps` per call, and both references in turn."""
    rounds = [
        (program.seconds(), bare.one_device.seconds(), bare.same_devices.seconds())
        for _ in range(repeats)
    ]
    work = inner_steps / bare.inner_steps
    return {
        "optimizer": name,
        "inner_steps_per_s": inner_steps / statistics.median(own for own, _, _ in rounds),
        "of_bare": work * statistics.median(one / own for own, one, _ in rounds),
        "of_bare_spread": work * statistics.median(same / own for own, _, same in rounds),
        "trace_s": program.trace_s,
        "compile_s": program.compile_s,
        "program_mb": program.megabytes,
    }


def _scaling(workload: Workload, cores: Sequence[int], generations: int) -> dict[str, Any]:
    """Times one process and two in turn."""
    rounds = [
        (
            _generations_per_second(workload, cores[:1], generations),
            _generations_per_second(workload, cores, generations),
        )
        for _ in range(SCALING_ROUNDS)
    ]
    return {
        "workload": workload._asdict(),
        "one_process": statistics.median(one for one, _ in rounds),
        "two_processes": statistics.median(two for _, two in rounds),
        "ratio": statistics.median(two / one for one, two in rounds),
    }


def _generations_per_second(workload: Workload, cores: Sequence[int], generations: int) -> float:
    """Speed of one meta-training by as many processes as `cores`, each on a core of its own."""
    context = get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    results = context.SimpleQueue()
    workers = [
        context.Process(
            target=_worker,
            kwargs={
                "workload": workload,
                "address": address,
                "core": core,
                "count": len(cores),
                "index": index,
                "generations": generations,
                "results": results,
            },
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
    *,
    workload: Workload,
    address: str,
    core: int,
    count: int,
    index: int,
    generations: int,
    results: Any,
) -> None:
    """One of `count` processes of a meta-training; puts the seconds of its generations."""
    os.sched_setaffinity(0, {core})  # before JAX counts the cores
    if count > 1:
        devices.initialise(address, count, index)
    mesh = devices.mesh_for(workload.population, workload.tasks)
    spread = devices.Spread(mesh)
    update = nes_generation(LEARNED["l3rs"](), mlp_task(workload), workload, spread)
    trainer = devices.replicated(update.trainer, mesh)
    step = devices.jit(update.step, mesh)
    state = devices.jit(lambda state: state, mesh)(update.state)  # placed as the next states
    state, _ = jax.block_until_ready(step(trainer, update.key_data, state))
    start = time.perf_counter()
    for _ in range(generations):
        state, metrics = step(trainer, update.key_data, state)
        jax.block_until_ready(metrics)
    results.put(time.perf_counter() - start)
    if count > 1:
        # Children exit without it, and the first to exit would end the other process.
        jax.distributed.shutdown()
