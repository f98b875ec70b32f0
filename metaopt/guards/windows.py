"""Cutting a stream of mini-batches into windows."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.checks import check_integer, short
from metaopt.core.types import Batch

Size = int | Callable[[], Any]


def windows(iterator: Iterable[Batch], n_t: Size, n_c: Size) -> Iterator[tuple[Batch, Batch]]:
    """Yields ``(train_batches [n_t, ...], eval_batches [n_c, ...])`` from single mini-batches.

    The first n_t mini-batches of each window are for training, the next n_c for validation: the
    order in which a streaming guard uses them. What is left at the end is dropped if it does not
    fill a window. NumPy arrays stay NumPy arrays.

    Args:
      iterator: mini-batches of one structure and shape.
      n_t, n_c: their numbers per window, ``windows(iterator, *guard.window)``; or functions that
        return them, asked before each window (adaptive sizes):
        ``windows(iterator, lambda: state.info.n_t, lambda: state.info.n_c)``.

    Raises:
      ValueError: a size below 1, or mini-batches that do not stack.

    Examples:
      >>> batches = [np.full((8, 3), i) for i in range(7)]
      >>> for train, held_out in windows(batches, 2, 1):
      ...     print(train.shape, held_out.shape)
      (2, 8, 3) (1, 8, 3)
      (2, 8, 3) (1, 8, 3)
    """
    if not isinstance(iterator, Iterable):
        raise ValueError(f"windows: iterator must be an iterable, got {short(iterator)}.")
    stream = iter(iterator)

    def cut():
        while True:
            given = [n() if callable(n) else n for n in (n_t, n_c)]
            _check(given)
            sizes = [int(n) for n in given]
            batches = list(islice(stream, sum(sizes)))
            if len(batches) < sum(sizes):
                return
            yield _stack(batches[: sizes[0]]), _stack(batches[sizes[0] :])

    _check([n for n in (n_t, n_c) if not callable(n)])
    return cut()


def _check(sizes: list[Any]) -> None:
    for size in sizes:
        check_integer("windows: n_t and n_c", size)
    if any(size < 1 for size in sizes):
        raise ValueError(f"windows: n_t and n_c must be at least 1, got {sizes}.")


def _stack(batches: list[Batch]) -> Batch:
    def stack(*leaves):
        if len({np.shape(leaf) for leaf in leaves}) > 1:
            shapes = sorted({np.shape(leaf) for leaf in leaves})
            raise ValueError(
                f"windows: mini-batches of a window must have one shape, got {shapes}; "
                "drop the last, smaller batch of an epoch."
            )
        on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
        return jnp.stack(leaves) if on_device else np.stack(leaves)

    structures = {jax.tree.structure(batch) for batch in batches}
    if len(structures) > 1:
        raise ValueError(
            "windows: mini-batches of a window must have one structure, got "
            f"{' and '.join(map(str, structures))}."
        )
    return jax.tree.map(stack, *batches)
