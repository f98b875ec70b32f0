"""Data sets that need no files: those of scikit-learn, and our spirals."""

from typing import Any

import numpy as np

from metaopt.core.checks import check_integer, check_number
from metaopt.core.extras import optional_imports
from metaopt.core.types import Batch, Split
from metaopt.datasets.dataset import Dataset, split_in_three


def digits() -> Dataset:
    """1797 real 8x8 images of handwritten digits, which are part of scikit-learn.

    Returns:
      Images uint8 ``[n, 8, 8, 1]`` with values 0..16 and scale 1/16, in ten classes.
    """
    with optional_imports("data", needed_by="metaopt.datasets.digits"):
        from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return split_in_three(
        name="digits",
        x=bunch.images.astype(np.uint8)[..., None],
        y=bunch.target,
        num_classes=10,
        scale=1.0 / 16.0,
    )


def breast_cancer() -> Dataset:
    """569 real biopsies in 30 measured features, which are part of scikit-learn.

    Returns:
      Features float32 ``[n, 30]``, of mean 0 and standard deviation 1 on the training examples, in
      two classes (malignant, benign).
    """
    with optional_imports("data", needed_by="metaopt.datasets.breast_cancer"):
        from sklearn.datasets import load_breast_cancer

    bunch: Any = load_breast_cancer()
    data = split_in_three(name="breast_cancer", x=bunch.data, y=bunch.target, num_classes=2)
    train = data.splits["train"]["x"]
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    splits: dict[Split, Batch] = {
        split: {"x": (examples["x"] - mean) / deviation, "y": examples["y"]}
        for split, examples in data.splits.items()
    }
    return data._replace(splits=splits)


def moons(n: int = 2000, *, noise: float = 0.15, seed: int = 0) -> Dataset:
    """scikit-learn's two moons.

    Args:
      n: number of points.
      noise: standard deviation of the noise on each coordinate.
      seed: of the noise and of the split.

    Returns:
      Points ``[n, 2]`` in two classes.

    Raises:
      ValueError: when an argument is out of range.
    """
    with optional_imports("data", needed_by="metaopt.datasets.moons"):
        from sklearn.datasets import make_moons

    _check_points("moons", n, noise)
    x, y = make_moons(n, noise=noise, random_state=seed)
    return _planar("moons", np.asarray(x), np.asarray(y), seed)


def circles(n: int = 2000, *, noise: float = 0.08, factor: float = 0.5, seed: int = 0) -> Dataset:
    """scikit-learn's two concentric circles.

    Args:
      n: number of points.
      noise: standard deviation of the noise on each coordinate.
      factor: radius of the inner circle relative to the outer one, in [0, 1).
      seed: of the noise and of the split.

    Returns:
      Points ``[n, 2]`` in two classes.

    Raises:
      ValueError: when an argument is out of range.
    """
    with optional_imports("data", needed_by="metaopt.datasets.circles"):
        from sklearn.datasets import make_circles

    _check_points("circles", n, noise)
    check_number("circles: factor", factor, least=0, below=1)
    x, y = make_circles(n, noise=noise, factor=factor, random_state=seed)
    return _planar("circles", np.asarray(x), np.asarray(y), seed)


def spirals(n: int = 2000, *, turns: float = 1.5, noise: float = 0.02, seed: int = 0) -> Dataset:
    """Two interleaved spirals inside the unit disc.

    Args:
      n: number of points.
      turns: revolutions of each spiral.
      noise: standard deviation of the noise on each coordinate.
      seed: of the points and of the split.

    Returns:
      Points ``[n, 2]`` in two classes.

    Raises:
      ValueError: when an argument is out of range.
    """
    _check_points("spirals", n, noise)
    check_number("spirals: turns", turns)
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    radius = np.sqrt(rng.uniform(0.0, 1.0, n))  # points are equally dense along the arc
    angle = 2 * np.pi * turns * radius + np.pi * y
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = x + noise * rng.standard_normal((n, 2))
    return _planar("spirals", x, y, seed)


def _planar(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> Dataset:
    return split_in_three(name=name, x=x.astype(np.float32), y=y, num_classes=2, seed=seed)


def _check_points(name: str, n: int, noise: float) -> None:
    check_integer(f"{name}: n", n, 1)
    check_number(f"{name}: noise", noise, least=0)
