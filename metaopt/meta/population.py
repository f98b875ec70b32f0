"""Inner runs of a population: over devices, and on each side by side or one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from metaopt.core import cpu
from metaopt.meta import devices


def evaluate(
    run: Callable[..., Any],
    population: Any,
    starts: Any,
    shared: Any,
    spread: devices.Spread,
    bytes_each: int = 0,
) -> Any:
    """``run(candidate, start, shared)`` for all candidates and starts, each where it is assigned.

    Every device makes the whole population from the key (noise is cheap beside an inner run) and
    evaluates its own share without cross-device communication. Only the results are gathered.

    Args:
      run: a pure function, for example the loss of an inner run.
      population: pytree of arrays ``[n, ...]``.
      starts: pytree of arrays ``[tasks, ...]``.
      shared: pytree that all runs share.
      spread: over which devices, and how many candidates at a time.
      bytes_each: size of the state that a run carries from step to step; 0: unknown.

    Returns:
      The results as ``[n, tasks, ...]``, the same on every device.
    """

    def share(population, starts, shared):
        def of_one(start):
            each = lambda candidate: run(candidate, start, shared)
            return cpu.for_each(each, population, bytes_each, spread.chunk)

        # Candidates share a task's mini-batches: for a core, that is enough work side by side.
        size = jax.tree.leaves(population)[0].shape[0]
        together = cpu.CACHE if cpu.cores_each() <= 1 else bytes_each * size
        results = cpu.for_each(of_one, starts, together)
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), results)

    if (mesh := spread.mesh) is None:
        return share(population, starts, shared)
    size, tasks = (jax.tree.leaves(tree)[0].shape[0] for tree in (population, starts))
    over_tasks = devices.TASK if tasks % mesh.shape[devices.TASK] == 0 else None
    spread_out = devices.over_runs(
        share,
        mesh,
        (PartitionSpec(devices.POPULATION), PartitionSpec(over_tasks), devices.WHOLE),
        PartitionSpec(devices.POPULATION, over_tasks),
    )
    filled = _filled(devices.gathered(population, mesh), mesh.shape[devices.POPULATION])
    results = devices.gathered(spread_out(filled, starts, shared), mesh)
    return jax.tree.map(lambda x: x[:size], results)


def evaluate_one(
    run: Callable[..., Any], starts: Any, shared: Any, mesh: Mesh | None, bytes_each: int = 0
) -> Any:
    """``run(start, shared)`` for all starts, shared out over all devices: see `evaluate`.

    Returns:
      The results as ``[tasks, ...]``, the same on every device.
    """

    def share(starts: Any, shared: Any) -> Any:
        return cpu.for_each(lambda start: run(start, shared), starts, bytes_each)

    if mesh is None:
        return share(starts, shared)
    size = jax.tree.leaves(starts)[0].shape[0]
    own = devices.runs_on_axis(0)
    filled = _filled(devices.gathered(starts, mesh), mesh.size)
    results = devices.gathered(
        devices.over_runs(share, mesh, (own, devices.WHOLE), own)(filled, shared), mesh
    )
    return jax.tree.map(lambda x: x[:size], results)


def _filled(tree: Any, count: int) -> Any:
    """Arrays ``[n, ...]`` with the last entry repeated until `count` divides them."""
    missing = -jax.tree.leaves(tree)[0].shape[0] % count
    fill = lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
    return jax.tree.map(fill, tree)
