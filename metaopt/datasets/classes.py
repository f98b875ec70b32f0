"""Classes of labelled data sets: some of them, two sets as one, images of another size."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from metaopt.core.types import Batch, Split
from metaopt.datasets.base import Dataset


def only_classes(data: Dataset, classes: Sequence[int]) -> Dataset:
    """The examples of some classes, relabelled ``0 .. len(classes) - 1`` in the order given."""
    check_classes(f"data set {data.name!r}", classes, data.num_classes)
    new = np.full(data.num_classes, -1, np.int32)
    new[list(classes)] = np.arange(len(classes))
    splits: dict[Split, Batch] = {}
    for split, examples in data.splits.items():
        labels = new[np.asarray(examples["y"])]
        kept = np.flatnonzero(labels >= 0)
        splits[split] = {"x": examples["x"][kept], "y": jnp.asarray(labels[kept])}
    name = f"{data.name}[{','.join(map(str, classes))}]"
    return Dataset(name, splits, len(classes), data.scale)


def union(*sets: Dataset) -> Dataset:
    """Several data sets of one image shape as one; labels of the later ones follow the former."""
    first = sets[0]
    shapes = {data.name: data.splits["train"]["x"].shape[1:] for data in sets}
    if len(set(shapes.values())) > 1 or len({data.scale for data in sets}) > 1:
        raise ValueError(f"union: images must have one shape and scale, got {shapes}.")
    offsets = np.cumsum([0, *(data.num_classes for data in sets)])
    splits: dict[Split, Batch] = {}
    for split in first.splits:
        parts = [data.splits[split] for data in sets]
        splits[split] = {
            "x": jnp.concatenate([part["x"] for part in parts]),
            "y": jnp.concatenate(
                [part["y"] + int(offset) for part, offset in zip(parts, offsets, strict=False)]
            ),
        }
    return Dataset("+".join(shapes), splits, int(offsets[-1]), first.scale)


def resized(data: Dataset, size: int) -> Dataset:
    """Images ``[n, H, W, C]`` enlarged to ``[n, size, size, C]`` by repetition, 8 bits a pixel."""
    splits: dict[Split, Batch] = {}
    for split, examples in data.splits.items():
        x = np.asarray(examples["x"])
        if x.ndim != 4:
            raise ValueError(f"resized: data set {data.name!r} holds no images [n, H, W, C].")
        rows, columns = (np.arange(size) * n // size for n in x.shape[1:3])
        x = np.rint(x[:, rows][:, :, columns] * (255.0 * data.scale)).astype(np.uint8)
        splits[split] = {"x": jnp.asarray(x), "y": examples["y"]}
    return Dataset(f"{data.name}-{size}", splits, data.num_classes, 1.0 / 255.0)


def check_classes(where: str, classes: Sequence[int], num_classes: int) -> None:
    """Raises `ValueError` unless `classes` are distinct labels below `num_classes`."""
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"{where}: classes must be distinct and not empty, got {list(classes)}.")
    if min(classes) < 0 or max(classes) >= num_classes:
        raise ValueError(
            f"{where}: classes must lie in 0..{num_classes - 1}, got {sorted(classes)}."
        )
