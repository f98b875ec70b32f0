"""The binary versions of CIFAR-10 and CIFAR-100: rows of one or two labels and 3072 image bytes.

The "python versions" are pickles, which can run code when they are opened: they are refused.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from metaopt.datasets.examples import Examples, Reading, from_arrays
from metaopt.datasets.sources import Files, only
from metaopt.datasets.specs import Spec

PARTS = {
    "cifar10": {
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
    },
    "cifar100": {"train": ("train.bin",), "test": ("test.bin",)},
}
LABELS = {"cifar10": ("label",), "cifar100": ("coarse_label", "label")}  # bytes before the image
NAMES = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}
PICKLES = ({"data_batch_1", "test_batch"}, {"train", "test", "meta"})
CHANNELS, SIDE = 3, 32


def read(files: Files, spec: Spec) -> Reading | None:
    """The .bin files; None where there is not one of them.

    Raises: ValueError: pickles instead, a missing file, a size or a label that cannot be.
    """
    parts = PARTS[spec.name]
    found = {name: only(files, name) for names in parts.values() for name in names}
    if not any(found.values()):
        there = {PurePosixPath(name).name for name in files.sizes}
        if any(pickles <= there for pickles in PICKLES):
            raise ValueError(
                f"{files.where}: the python version of {spec.name} is made of pickles, which can "
                f"run code; get the binary version ({', '.join(found)})."
            )
        return None
    rows: dict[str, list[np.ndarray]] = {split: [] for split in parts}
    for split, names in parts.items():
        for name in names:
            path = found[name]
            if path is None:
                raise ValueError(
                    f"{files.where}: {name} is missing; put it beside the others, then give "
                    f"`metaopt data prepare {spec.name} --from {files.where}` again."
                )
            rows[split].append(_rows(files, path, spec))
    splits = {split: _examples(np.concatenate(rows[split]), split, spec) for split in parts}
    return Reading(splits, (SIDE, SIDE, CHANNELS), _class_names(files, spec))


def _rows(files: Files, path: str, spec: Spec) -> np.ndarray:
    """uint8 ``[n, labels + 3072]``."""
    width = len(LABELS[spec.name]) + CHANNELS * SIDE * SIDE
    size = files.sizes[path]
    if size == 0 or size % width:
        raise ValueError(
            f"{files.where}/{path}: {size} bytes are no whole number of rows of {width}; it is cut "
            f"short or not of {spec.name}: get it again."
        )
    with files.open(path) as file:
        rows = np.frombuffer(file.read(), np.uint8).reshape(-1, width)
    largest = rows[:, len(LABELS[spec.name]) - 1].max()
    if largest >= spec.num_classes:
        raise ValueError(
            f"{files.where}/{path}: label {largest}, but {spec.name} has {spec.num_classes} "
            "classes; get it again."
        )
    return rows


def _examples(rows: np.ndarray, split: str, spec: Spec) -> Examples:
    fields = LABELS[spec.name]
    planes = rows[:, len(fields) :].reshape(-1, CHANNELS, SIDE, SIDE)  # red, green, blue

    def extra(i: int) -> Mapping[str, Any]:
        labels = {field: int(rows[i, column]) for column, field in enumerate(fields)}
        return {**labels, "id": f"{split}_{i:05d}"}

    return from_arrays(planes.transpose(0, 2, 3, 1), rows[:, len(fields) - 1], extra)


def _class_names(files: Files, spec: Spec) -> tuple[str, ...]:
    path = only(files, NAMES[spec.name])
    if path is None:
        return tuple(map(str, range(spec.num_classes)))
    with files.open(path) as file:
        return tuple(file.read().decode().split())
