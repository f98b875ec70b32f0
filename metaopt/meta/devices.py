"""The devices and processes that share a meta-training, and the distribution of runs over them."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from metaopt.core import cpu

POPULATION, TASK = "population", "task"


class Spread(NamedTuple):
    """The distribution of inner runs over devices; the default is one device.

    Attributes:
      mesh: devices with the axes `POPULATION` and `TASK` (see `mesh_for`); None: one device.
      chunk: candidates (of NES), pairs (of PES) or runs (of back-propagation) that a device takes
        at a time, which bounds its memory; 0: all, or on CPU as many as are fastest.
    """

    mesh: Mesh | None = None
    chunk: int = 0


EVERYTHING_HERE = Spread()
WHOLE = PartitionSpec()  # of an array that lies whole on every device


def initialise(
    coordinator: str = "auto",
    num_processes: int | None = None,
    process_id: int | None = None,
    cpu_devices: int = 0,
) -> None:
    """Joins the processes of one meta-training, and makes each CPU core of this one a device.

    Call it before anything else uses JAX: the first use fixes JAX's devices.

    Args:
      coordinator: "auto" joins the processes that Slurm, Open MPI or a TPU pod started, and does
        nothing elsewhere. "none" never joins. ``host:port`` is an address of process 0 that all
        others can reach.
      num_processes: number of processes, with ``host:port``.
      process_id: index of this process, with ``host:port``.
      cpu_devices: devices that the CPU is divided into; 0: one per core that this process may use.
        XLA runs programs of this size on one core each.

    Raises:
      ValueError: the arguments do not fit together.
    """
    _divide_cpu(cpu_devices)
    explicit = coordinator not in ("auto", "none")
    if explicit != (num_processes is not None) or explicit != (process_id is not None):
        raise ValueError(
            "coordinator host:port, num_processes and process_id go together, got "
            f"{coordinator!r}, {num_processes} and {process_id}."
        )
    if jax.distributed.is_initialized():
        return
    if not explicit:
        if coordinator == "auto" and _started_in_parallel():
            jax.distributed.initialize()
        return
    assert num_processes is not None and process_id is not None
    if ":" not in coordinator:
        raise ValueError(f"coordinator must be host:port, auto or none, got {coordinator!r}.")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id must be 0 to {num_processes - 1} (num_processes - 1), got {process_id}."
        )
    jax.distributed.initialize(coordinator, num_processes, process_id)


def _divide_cpu(count: int) -> None:
    """Sets the number of CPU devices, unless a user's JAX already has one."""
    flag = "xla_force_host_platform_device_count"
    given = jax.config.jax_num_cpu_devices  # type: ignore
    if given > 0 or flag in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # JAX was used before
        jax.config.update("jax_num_cpu_devices", count or cpu.cores())


def _started_in_parallel() -> bool:
    """True if a launcher that JAX knows started more than one process."""
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    if any(int(os.environ.get(name) or 1) > 1 for name in counts):
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return chips and importlib.util.find_spec("libtpu") is not None


def mesh_shape(population: int, tasks: int, count: int) -> tuple[int, int]:
    """Sizes of the axes `POPULATION` and `TASK` that minimise the work of the busiest device.

    The axis of the population need not divide the population (the last share is padded); the axis
    of tasks must divide the tasks.
    """
    shapes = [(count // n, n) for n in range(1, count + 1) if count % n == 0 == tasks % n]
    return min(shapes, key=lambda s: (-(-population // s[0]) * (tasks // s[1]), s[1]))


def mesh_for(population: int, tasks: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over which `metaopt.meta.population.evaluate` distributes a generation.

    Args:
      population: candidates of a generation.
      tasks: tasks of a generation.
      devices: the devices; None: those of all processes. A single process uses no more devices than
        there are runs.
    """
    devices = list(jax.devices() if devices is None else devices)
    if jax.process_count() == 1:
        devices = devices[: population * tasks]
    shape = mesh_shape(population, tasks, len(devices))
    return jax.make_mesh(shape, (POPULATION, TASK), (AxisType.Auto,) * 2, devices=devices)


def over_runs(
    fn: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`fn` of arrays with an axis of runs; every device computes its share of the runs.

    Args:
      fn: a pure function that treats runs independently.
      mesh: the devices; None: `fn` itself.
      in_specs: for each argument `WHOLE`, or the position of the axis of runs (`runs_on_axis`).
      out_specs: the same for the results.
    """
    if mesh is None:
        return fn
    # Loop carries that begin as constants are fine: nothing is reduced over devices.
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def runs_on_axis(axis: int) -> PartitionSpec:
    """An array whose `axis` counts runs, shared out over all devices of a mesh."""
    return PartitionSpec(*[None] * axis, (POPULATION, TASK))


def specs_of(tree: Any, spec: PartitionSpec = WHOLE) -> Any:
    """The same `spec` for every leaf."""
    return jax.tree.map(lambda _: spec, tree)


def gathered(tree: Any, mesh: Mesh | None) -> Any:
    """`tree`, whole on every device."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, WHOLE))


def check_shares(where: str, runs: int, mesh: Mesh | None) -> None:
    """Raises `ValueError` unless the devices of `mesh` can share so many runs evenly."""
    if mesh is not None and runs % mesh.size:
        raise ValueError(
            f"{where}: {runs} cannot be shared evenly by {mesh.size} devices; "
            f"give a multiple of {mesh.size}."
        )


def jit(
    fn: Callable[..., Any], mesh: Mesh | None, specs: Any = WHOLE, **settings: Any
) -> Callable[..., Any]:
    """`metaopt.core.cpu.jit` of a function whose results lie on `mesh` as `specs` say.

    Arguments are numpy arrays that are equal in all processes, pytrees from `replicated`, or
    results of such functions.

    Args:
      fn: a pure function of pytrees of arrays.
      mesh: None: one device.
      specs: a `PartitionSpec` for each result, or one for all.
      **settings: of `jax.jit`.
    """
    if mesh is None:
        return cpu.jit(fn, **settings)
    return cpu.jit(fn, out_shardings=placed(specs, mesh), **settings)


def replicated(tree: Any, mesh: Mesh | None) -> Any:
    """`tree`, for example a task family, with a copy of its arrays on every device of `mesh`.

    Every process has the whole tree.
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, WHOLE)

    def copy(array: Any) -> Any:
        if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.device_put(array, sharding)
        # JAX does not copy keys to the devices of other processes.
        bits = jax.device_put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(array))

    return jax.tree.map(copy, tree)


def placed(specs: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every `PartitionSpec`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def anywhere(*flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process; every process must ask."""
    if jax.process_count() == 1:
        return list(flags)
    given = multihost_utils.process_allgather(np.array(flags))
    return np.any(np.reshape(given, (-1, len(flags))), axis=0).tolist()
