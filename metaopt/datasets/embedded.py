"""Data sets that need no file: scikit-learn's digits, moons and circles, and our spirals."""

from typing import Any

import numpy as np

from metaopt.core.checks import check_integer, check_number
from metaopt.core.extras import optional_imports
from metaopt.datasets.base import Dataset, split_in_three


def digits() -> Dataset:
    """1797 real 8x8 images of handwritten digits, embedded in scikit-learn; no download."""
    with optional_imports("data", needed_by="metaopt.datasets.digits"):
        from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = bunch.images.astype(np.uint8)[..., None]  # [1797, 8, 8, 1], values 0..16
    return split_in_three("digits", images, bunch.target, 10, scale=1.0 / 16.0)


def moons(n: int = 2000, *, noise: float = 0.15, seed: int = 0) -> Dataset:
    """scikit-learn's two moons, ``[n, 2]``, two classes."""
    with optional_imports("data", needed_by="metaopt.datasets.moons"):
        from sklearn.datasets import make_moons

    _check("moons", n, noise)
    x, y = map(np.asarray, make_moons(n, noise=noise, random_state=seed))
    return split_in_three("moons", x.astype(np.float32), y, 2, seed=seed)


def circles(n: int = 2000, *, noise: float = 0.08, factor: float = 0.5, seed: int = 0) -> Dataset:
    """scikit-learn's two circles, ``[n, 2]``, two classes."""
    with optional_imports("data", needed_by="metaopt.datasets.circles"):
        from sklearn.datasets import make_circles

    _check("circles", n, noise)
    check_number("circles: factor", factor, least=0, below=1)
    x, y = map(np.asarray, make_circles(n, noise=noise, factor=factor, random_state=seed))
    return split_in_three("circles", x.astype(np.float32), y, 2, seed=seed)


def spirals(n: int = 2000, *, turns: float = 1.5, noise: float = 0.02, seed: int = 0) -> Dataset:
    """Two interleaved spirals of `turns` turns inside the unit disc, ``[n, 2]``, two classes."""
    _check("spirals", n, noise)
    check_number("spirals: turns", turns)
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    radius = np.sqrt(rng.uniform(0.0, 1.0, n))  # points are equally dense along the arc
    angle = 2 * np.pi * turns * radius + np.pi * y
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = x + noise * rng.standard_normal((n, 2))
    return split_in_three("spirals", x.astype(np.float32), y, 2, seed=seed)


def _check(name: str, n: int, noise: float) -> None:
    check_integer(f"{name}: n", n, 1)
    check_number(f"{name}: noise", noise, least=0)
