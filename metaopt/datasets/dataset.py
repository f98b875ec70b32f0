"""The `Dataset`: labelled arrays in three splits, their check, and functions that change classes.

Images stay uint8 in memory and are scaled when they are used.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer, Num

from metaopt.core.checks import check_integer, check_number, show
from metaopt.core.types import SPLITS, Batch, Split


class Dataset(NamedTuple):
    """Labelled examples.

    Attributes:
      name: the name in messages.
      splits: split -> ``{"x": [n, ...], "y": [n] int}``. Optimizers train on "train"; tuning and
        meta-learning are judged on "valid"; results are measured on "test".
      num_classes: labels are ``0 .. num_classes - 1``.
      scale: networks see ``x * scale`` (1/255 for 8-bit images).
    """

    name: str
    splits: dict[Split, Batch]
    num_classes: int
    scale: float = 1.0


def check(data: Dataset) -> Dataset:
    """Checks that every split can be used.

    Args:
      data: the data set.

    Returns:
      `data` itself.

    Raises:
      ValueError: when a split is missing, empty, of other shapes or types than `Dataset` says,
        or contains NaN, inf or a label out of range; names the split.
    """
    if not isinstance(data, Dataset):
        raise ValueError(f"data must be a Dataset, got {show(data)}; see metaopt.datasets.")
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
        with np.errstate(over="ignore"):  # float64 becomes float32 unless JAX has it enabled
            x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
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
    """Shuffles examples and splits them 70 / 10 / 20 per cent into train / valid / test.

    Args:
      name: the name in messages.
      x: inputs.
      y: labels, in ``0 .. num_classes - 1``.
      num_classes: number of classes.
      scale: networks see ``x * scale``.
      seed: of the shuffle.

    Returns:
      The data set, checked.

    Raises:
      ValueError: when there are fewer than 10 examples, or `check` refuses them.
    """
    n = len(x)
    if n < 10:
        raise ValueError(f"data set {name!r}: needs at least 10 examples to split, got {n}.")
    order = np.random.default_rng(seed).permutation(n)
    train_end, valid_end = int(0.7 * n), int(0.8 * n)
    indices: dict[Split, np.ndarray] = {
        "train": order[:train_end],
        "valid": order[train_end:valid_end],
        "test": order[valid_end:],
    }
    splits: dict[Split, Batch] = {
        split: {"x": jnp.asarray(x[chosen]), "y": jnp.asarray(y[chosen], jnp.int32)}
        for split, chosen in indices.items()
    }
    return check(Dataset(name=name, splits=splits, num_classes=num_classes, scale=scale))


def only_classes(data: Dataset, classes: Sequence[int]) -> Dataset:
    """Keeps the examples of some classes.

    Args:
      data: the data set.
      classes: labels to keep; they become ``0 .. len(classes) - 1`` in the order given.

    Returns:
      The smaller data set.

    Raises:
      ValueError: as `check_classes`.
    """
    check_classes(f"data set {data.name!r}", classes, data.num_classes)
    new_label = np.full(data.num_classes, -1, np.int32)  # -1: not kept
    new_label[list(classes)] = np.arange(len(classes))
    splits: dict[Split, Batch] = {}
    for split, examples in data.splits.items():
        labels = new_label[np.asarray(examples["y"])]
        kept = np.flatnonzero(labels >= 0)
        splits[split] = {"x": examples["x"][kept], "y": jnp.asarray(labels[kept])}
    name = f"{data.name}[{','.join(map(str, classes))}]"
    return Dataset(name=name, splits=splits, num_classes=len(classes), scale=data.scale)


def check_classes(where: str, classes: Sequence[int], num_classes: int) -> None:
    """Checks that `classes` are distinct labels of a data set.

    Args:
      where: the name in the message.
      classes: the labels to check.
      num_classes: of the data set.

    Raises:
      ValueError: when there is no label, one is given twice, or one is out of range.
    """
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"{where}: classes must be distinct and not empty, got {list(classes)}.")
    if min(classes) < 0 or max(classes) >= num_classes:
        raise ValueError(
            f"{where}: classes must lie in 0..{num_classes - 1}, got {sorted(classes)}."
        )


def with_fewer_held_out(data: Dataset, most: int) -> Dataset:
    """Keeps at most `most` examples, evenly spaced, of "valid" and of "test".

    Runs on small networks would otherwise spend most of their time on measurements.

    Args:
      data: the data set.
      most: examples to keep of each of the two splits.

    Returns:
      The smaller data set; its "train" split is that of `data`.

    Raises:
      ValueError: when `most` is not positive.
    """
    check_integer("with_fewer_held_out: most", most, 1)

    def fewer(examples: Batch) -> Batch:
        number = len(examples["y"])
        kept = np.arange(min(most, number)) * number // min(most, number)
        return {name: array[kept] for name, array in examples.items()}

    splits: dict[Split, Batch] = {
        split: examples if split == "train" else fewer(examples)
        for split, examples in data.splits.items()
    }
    return data._replace(splits=splits)


def union(*sets: Dataset) -> Dataset:
    """Concatenates data sets, each with classes of its own.

    Args:
      *sets: data sets with the same shape of inputs and the same scale.

    Returns:
      The data set. The labels of each set follow those of the sets before it.

    Raises:
      ValueError: when no set is given, or shapes or scales differ.
    """
    if not sets:
        raise ValueError("union: give at least one data set.")
    shapes = [data.splits["train"]["x"].shape[1:] for data in sets]
    scales = [data.scale for data in sets]
    names = [data.name for data in sets]
    if len(set(shapes)) > 1 or len(set(scales)) > 1:
        described = [
            f"{name} {shape} with scale {scale:g}"
            for name, shape, scale in zip(names, shapes, scales, strict=True)
        ]
        raise ValueError(
            f"union: images must have one shape and scale, got {', '.join(described)}."
        )
    offsets = np.cumsum([0, *(data.num_classes for data in sets)])
    splits: dict[Split, Batch] = {}
    for split in sets[0].splits:
        parts = [data.splits[split] for data in sets]
        labels = [part["y"] + int(first) for part, first in zip(parts, offsets[:-1], strict=True)]
        splits[split] = {
            "x": jnp.concatenate([part["x"] for part in parts]),
            "y": jnp.concatenate(labels),
        }
    return Dataset(
        name="+".join(dict.fromkeys(names)),
        splits=splits,
        num_classes=int(offsets[-1]),
        scale=sets[0].scale,
    )


def resized(data: Dataset, size: int) -> Dataset:
    """Resizes images to ``[n, size, size, C]``, uint8, by nearest neighbours.

    Args:
      data: a data set of images ``[n, H, W, C]``.
      size: the new height and width in pixels.

    Returns:
      The data set of the new images, with scale 1/255.

    Raises:
      ValueError: when the inputs are not images, or `size` is not positive.
    """
    check_integer("resized: size", size, 1)
    splits: dict[Split, Batch] = {}
    for split, examples in data.splits.items():
        x = np.asarray(examples["x"])
        if x.ndim != 4:
            raise ValueError(f"resized: data set {data.name!r} holds no images [n, H, W, C].")
        rows, columns = (np.arange(size) * side // size for side in x.shape[1:3])
        pixels = x[:, rows][:, :, columns] * (255.0 * data.scale)
        splits[split] = {"x": jnp.asarray(np.rint(pixels).astype(np.uint8)), "y": examples["y"]}
    return Dataset(
        name=f"{data.name}-{size}", splits=splits, num_classes=data.num_classes, scale=1.0 / 255.0
    )
