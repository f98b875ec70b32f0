"""Data sets as arrays in three splits; images stay uint8 in memory and are scaled on use."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, Num

from metaopt.core.checks import check_number, short
from metaopt.core.types import SPLITS, Batch, Split


class Dataset(NamedTuple):
    """Labelled examples.

    Attributes:
      name: how messages call it.
      splits: split -> ``{"x": [n, ...], "y": [n] int}``. Optimizers train on "train";
        everything that is tuned or meta-learned is judged on "valid"; results are read off "test".
      num_classes: labels are ``0 .. num_classes - 1``.
      scale: ``x * scale`` is what a network sees (1/255 for 8-bit images).
    """

    name: str
    splits: dict[Split, Batch]
    num_classes: int
    scale: float = 1.0


def check(data: Dataset) -> Dataset:
    """Returns `data` if every split is usable, or raises `ValueError` with the split's name."""
    if not isinstance(data, Dataset):
        raise ValueError(f"data must be a Dataset, got {short(data)}; see metaopt.datasets.")
    if set(data.splits) != set(SPLITS):
        raise ValueError(
            f"data set {data.name!r}: its splits must be {', '.join(SPLITS)}, got "
            f"{', '.join(data.splits) or 'none'}; split_in_three makes them."
        )
    check_number(f"data set {data.name!r}: scale", data.scale)
    for split, examples in data.splits.items():
        where = f"data set {data.name!r}, split {split!r}"
        for key in ("x", "y"):
            if key not in examples:
                raise ValueError(f"{where}: lacks {key!r}.")
        x, y = np.asarray(examples["x"]), np.asarray(examples["y"])
        if x.dtype.kind not in "biuf":
            raise ValueError(f"{where}: inputs must be numbers, got {x.dtype}.")
        if not x.ndim or y.ndim != 1:
            raise ValueError(
                f"{where}: inputs must be [n, ...] and labels must be [n], got shapes "
                f"{x.shape} and {y.shape}."
            )
        if len(x) == 0:
            raise ValueError(f"{where}: it is empty; give at least one example.")
        if len(x) != len(y):
            raise ValueError(f"{where}: {len(x)} inputs, but {len(y)} labels.")
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            bad = int((~np.isfinite(x)).reshape(len(x), -1).any(axis=1).sum())
            raise ValueError(f"{where}: {bad} of {len(x)} inputs hold NaN or inf; remove them.")
        if not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{where}: labels must be integers, got {y.dtype}.")
        if y.min() < 0 or y.max() >= data.num_classes:
            raise ValueError(
                f"{where}: labels must lie in 0..{data.num_classes - 1}, "
                f"got {y.min()}..{y.max()}; check num_classes."
            )
    return data


def split_in_three(
    name: str,
    x: Num[np.ndarray, "n ..."],
    y: Integer[np.ndarray, " n"],
    num_classes: int,
    *,
    scale: float = 1.0,
    seed: int = 0,
) -> Dataset:
    """Shuffles with a fixed seed and splits 70 / 10 / 20 per cent into train / valid / test."""
    n = len(x)
    if n < 10:
        raise ValueError(f"data set {name!r}: needs at least 10 examples to split, got {n}.")
    order = np.random.default_rng(seed).permutation(n)
    bounds = (0, int(0.7 * n), int(0.8 * n), n)
    splits: dict[Split, Batch] = {}
    for split, start, stop in zip(("train", "valid", "test"), bounds[:-1], bounds[1:], strict=True):
        chosen = order[start:stop]
        splits[split] = {"x": jnp.asarray(x[chosen]), "y": jnp.asarray(y[chosen], jnp.int32)}
    return check(Dataset(name, splits, num_classes, scale))
