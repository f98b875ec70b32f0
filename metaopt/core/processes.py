"""Function calls in parallel processes, each on its own share of the CPU cores."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any


def in_processes(fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Calls ``fn(*call)`` for each of `calls`, in parallel processes.

    XLA runs programs as small as ours on one core, and processes that share cores wait for each
    other's threads. Processes with cores of their own are twice as fast as one process.

    Args:
      fn: a function that can be imported by name in another process.
      calls: positional arguments of each call.
      workers: number of processes; 1 makes the calls in this process, one after the other.

    Raises:
      ChildProcessError: when a process ended before its call, for example for want of memory.
    """
    if workers == 1:
        for call in calls:
            fn(*call)
        return
    context = get_context("spawn")
    worker_numbers = context.SimpleQueue()
    for number in range(workers):
        worker_numbers.put(number)
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=context,
        initializer=_begin,
        initargs=(worker_numbers, workers),
    )
    try:
        with pool:
            for future in [pool.submit(fn, *call) for call in calls]:
                future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process ended before its task, perhaps killed for want of memory; give the "
            "command again to go on, with fewer workers."
        ) from None


def _begin(worker_numbers: Any, workers: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _take_cores(worker_numbers, workers)


def _end_with_parent() -> None:
    """Ends this process when its parent ends, however that ends; else it would go on writing."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _take_cores(worker_numbers: Any, workers: int) -> None:
    """Pins this process to its share of the cores. Runs before JAX counts them."""
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        share = cores[worker_numbers.get() :: workers]
        os.sched_setaffinity(0, share or cores)
