"""Inner runs of a population: over devices, and on each side by side or one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from metaopt.meta import devices

CACHE = 2**21  # bytes that a CPU core has near: what runs hold side by side should fit


def evaluate(
    run: Callable[..., Any],
    population: Any,
    starts: Any,
    shared: Any,
    spread: devices.Spread,
    held: int = 0,
) -> Any:
    """``run(candidate, start, shared)`` for all candidates and starts, each where it is assigned.

    Every device makes the whole population from the key (noise is cheap beside an inner run) and
    evaluates its own share, without a word to the others; then only the results are gathered.

    Args:
      run: a pure function, for example the loss of an inner run.
      population: pytree of arrays ``[n, ...]``.
      starts: pytree of arrays ``[tasks, ...]``.
      shared: pytree that all runs share.
      spread: over which devices, and how many candidates at a time.
      held: bytes that a run carries from step to step, where that is known.

    Returns: the results as ``[n, tasks, ...]``, the same on every device.
    """

    def share(population, starts, shared):
        def of_one(start):
            each = lambda candidate: run(candidate, start, shared)
            return for_each(each, population, held, spread.chunk)

        # Candidates share a task's mini-batches: for a core, that is enough work side by side.
        size = jax.tree.leaves(population)[0].shape[0]
        results = for_each(of_one, starts, CACHE if devices.cores_each() <= 1 else held * size)
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
    run: Callable[..., Any], starts: Any, shared: Any, mesh: Mesh | None, held: int = 0
) -> Any:
    """``run(start, shared)`` for all starts, shared out over all devices: see `evaluate`.

    Returns: the results as ``[tasks, ...]``, the same on every device.
    """
    share = lambda starts, shared: for_each(lambda start: run(start, shared), starts, held)
    if mesh is None:
        return share(starts, shared)
    size = jax.tree.leaves(starts)[0].shape[0]
    own = devices.runs_on_axis(0)
    filled = _filled(devices.gathered(starts, mesh), mesh.size)
    results = devices.gathered(
        devices.over_runs(share, mesh, (own, devices.WHOLE), own)(filled, shared), mesh
    )
    return jax.tree.map(lambda x: x[:size], results)


def for_each(fn: Callable[[Any], Any], xs: Any, held: int = 0, chunk: int = 0) -> Any:
    """`fn` of each entry of ``xs [n, ...]``, side by side or one after the other.

    On CPU a `vmap` over runs on different data moves their axis before and after each product of
    matrices, and puts what they hold out of the cache; one after the other, each operation costs
    its start (docs/scaling.md has the numbers).

    Args:
      fn: a pure function.
      xs: pytree of arrays.
      held: bytes that an entry is at work on. On CPU so many entries go side by side as fit in the
        `CACHE` of a device's cores, and one that does not fit has no axis either; elsewhere all.
      chunk: go side by side in any case; 0: see `held`.
    """
    size = jax.tree.leaves(xs)[0].shape[0]
    if not chunk:
        fits = lambda n: n * held <= CACHE * devices.cores_each()
        # A divisor, so that one program does all.
        chunk = max((n for n in range(1, size + 1) if size % n == 0 and fits(n)), default=0)
    if chunk >= size:
        return jax.vmap(fn)(xs)
    return jax.lax.map(fn, xs, batch_size=chunk if chunk > 1 else None)


def _filled(tree: Any, count: int) -> Any:
    """Arrays ``[n, ...]`` with the last entry repeated until `count` divides them."""
    missing = -jax.tree.leaves(tree)[0].shape[0] % count
    fill = lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)]) if missing else x
    return jax.tree.map(fill, tree)
