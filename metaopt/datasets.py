"""Data sets as arrays in three splits; images stay uint8 in memory and are scaled on use."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metaopt.base import Batch, Split


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
    for split, examples in data.splits.items():
        where = f"data set {data.name!r}, split {split!r}"
        x, y = np.asarray(examples["x"]), np.asarray(examples["y"])
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
    name: str, x: np.ndarray, y: np.ndarray, num_classes: int, *, scale: float = 1.0, seed: int = 0
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


def digits() -> Dataset:
    """1797 real 8x8 images of handwritten digits, embedded in scikit-learn; no download."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = bunch.images.astype(np.uint8)[..., None]  # [1797, 8, 8, 1], values 0..16
    return split_in_three("digits", images, bunch.target, 10, scale=1.0 / 16.0)


def moons(n: int = 2000, *, noise: float = 0.15, seed: int = 0) -> Dataset:
    """scikit-learn's two moons, ``[n, 2]``, two classes."""
    from sklearn.datasets import make_moons

    x, y = map(np.asarray, make_moons(n, noise=noise, random_state=seed))
    return split_in_three("moons", x.astype(np.float32), y, 2, seed=seed)


def circles(n: int = 2000, *, noise: float = 0.08, factor: float = 0.5, seed: int = 0) -> Dataset:
    """scikit-learn's two circles, ``[n, 2]``, two classes."""
    from sklearn.datasets import make_circles

    x, y = map(np.asarray, make_circles(n, noise=noise, factor=factor, random_state=seed))
    return split_in_three("circles", x.astype(np.float32), y, 2, seed=seed)


def spirals(n: int = 2000, *, turns: float = 1.5, noise: float = 0.02, seed: int = 0) -> Dataset:
    """Two interleaved spirals of `turns` turns inside the unit disc, ``[n, 2]``, two classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    radius = np.sqrt(rng.uniform(0.0, 1.0, n))  # points are equally dense along the arc
    angle = 2 * np.pi * turns * radius + np.pi * y
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = x + noise * rng.standard_normal((n, 2))
    return split_in_three("spirals", x.astype(np.float32), y, 2, seed=seed)
