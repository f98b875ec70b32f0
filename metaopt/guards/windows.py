"""Cutting a stream of mini-batches into windows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaopt.core.checks import check_integer, show
from metaopt.core.types import Batch

Size = int | Callable[[], Any]


def windows(iterator: Iterable[Batch], n_t: Size, n_c: Size) -> Iterator[tuple[Batch, Batch]]:
    """Cuts a stream of mini-batches into windows for guards.

    The first n_t mini-batches of each window are for training, the next n_c for validation, in the
    order in which a guard takes them one by one. Mini-batches left at the end that do not fill a
    window are dropped. NumPy arrays stay NumPy arrays.

    Args:
      iterator: mini-batches of one structure and shape.
      n_t: training mini-batches of a window, as in ``windows(iterator, *guard.window)``; or a
        function that returns their number, called before each window, for adaptive sizes:
        ``windows(iterator, lambda: state.info.n_t, lambda: state.info.n_c)``.
      n_c: validation mini-batches of a window, or a function that returns their number.

    Yields:
      ``(train_batches, eval_batches)`` with leading axes ``[n_t, ...]`` and ``[n_c, ...]``;
      `eval_batches` is None where n_c is 0.

    Raises:
      ValueError: when n_t is below 1, n_c below 0, or the mini-batches of a window do not stack.

    Examples:
      >>> batches = [np.full((8, 3), i) for i in range(7)]
      >>> for train, held_out in windows(batches, 2, 1):
      ...     print(train.shape, held_out.shape)
      (2, 8, 3) (1, 8, 3)
      (2, 8, 3) (1, 8, 3)
    """
    if not isinstance(iterator, Iterable):
        raise ValueError(f"windows: iterator must be an iterable, got {show(iterator)}.")
    _check_sizes(1 if callable(n_t) else n_t, 0 if callable(n_c) else n_c)
    return _cut(iter(iterator), n_t, n_c)


def _cut(stream: Iterator[Batch], n_t: Size, n_c: Size) -> Iterator[tuple[Batch, Batch]]:
    while True:
        sizes = [size() if callable(size) else size for size in (n_t, n_c)]
        _check_sizes(*sizes)
        num_train, num_eval = (int(size) for size in sizes)
        batches = list(islice(stream, num_train + num_eval))
        if len(batches) < num_train + num_eval:
            return
        yield _stack(batches[:num_train]), _stack(batches[num_train:]) if num_eval else None


def _check_sizes(n_t: Any, n_c: Any) -> None:
    check_integer("windows: n_t", n_t, 1)
    check_integer("windows: n_c", n_c, 0)


def _stack(batches: Sequence[Batch]) -> Batch:
    structures = {jax.tree.structure(batch) for batch in batches}
    if len(structures) > 1:
        raise ValueError(
            "windows: mini-batches of a window must have one structure, got "
            f"{' and '.join(map(str, structures))}."
        )

    def stack(*leaves):
        shapes = {np.shape(leaf) for leaf in leaves}
        if len(shapes) > 1:
            raise ValueError(
                f"windows: mini-batches of a window must have one shape, got {sorted(shapes)}; "
                "drop the last, smaller batch of an epoch."
            )
        on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
        return jnp.stack(leaves) if on_device else np.stack(leaves)

    return jax.tree.map(stack, *batches)
