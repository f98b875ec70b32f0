"""Reader of the binary versions of CIFAR-10 and CIFAR-100: rows of labels and 3072 image bytes.

The "python versions" are pickles, which can run code when they are opened: they are refused.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from metaopt.datasets.catalog import Spec
from metaopt.datasets.sources import Examples, Files, ImageSet, examples_from_arrays, find_one

BATCH_FILES = {
    "cifar10": {
        "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test": ("test_batch.bin",),
    },
    "cifar100": {"train": ("train.bin",), "test": ("test.bin",)},
}
LABEL_FIELDS = {"cifar10": ("label",), "cifar100": ("coarse_label", "label")}  # bytes before image
CLASS_NAME_FILES = {"cifar10": "batches.meta.txt", "cifar100": "fine_label_names.txt"}
PICKLES = ({"data_batch_1", "test_batch"}, {"train", "test", "meta"})
CHANNELS, SIDE = 3, 32


def read(files: Files, spec: Spec) -> ImageSet | None:
    """Reads the .bin files.

    Args:
      files: the source.
      spec: of cifar10 or cifar100.

    Returns:
      The images, or None when none of the files is there.

    Raises:
      ValueError: when a file is missing, has an impossible size or label, or when there are
        pickles instead.
    """
    batch_files = BATCH_FILES[spec.name]
    paths = {name: find_one(files, name) for names in batch_files.values() for name in names}
    if not any(paths.values()):
        names = {PurePosixPath(path).name for path in files.sizes}
        if any(pickles <= names for pickles in PICKLES):
            raise ValueError(
                f"{files.where}: the python version of {spec.name} is made of pickles, which can "
                f"run code; get the binary version ({', '.join(paths)})."
            )
        return None
    splits = {}
    for split, names in batch_files.items():
        batches = []
        for name in names:
            path = paths[name]
            if path is None:
                raise ValueError(
                    f"{files.where}: {name} is missing; put it beside the others, then run "
                    f"`metaopt data prepare {spec.name} --from {files.where}` again."
                )
            batches.append(_read_rows(files, path, spec))
        splits[split] = _examples(np.concatenate(batches), split, spec)
    return ImageSet(
        splits=splits, shape=(SIDE, SIDE, CHANNELS), class_names=_class_names(files, spec)
    )


def _read_rows(files: Files, path: str, spec: Spec) -> np.ndarray:
    """uint8 ``[n, labels + 3072]``."""
    num_labels = len(LABEL_FIELDS[spec.name])
    width = num_labels + CHANNELS * SIDE * SIDE
    size = files.sizes[path]
    if size == 0 or size % width:
        raise ValueError(
            f"{files.where}/{path}: {size} bytes are not a whole number of {width}-byte rows; the "
            f"file is cut short or not part of {spec.name}: download it again."
        )
    rows = np.frombuffer(files.read(path), np.uint8).reshape(-1, width)
    largest = rows[:, num_labels - 1].max()
    if largest >= spec.num_classes:
        raise ValueError(
            f"{files.where}/{path}: label {largest}, but {spec.name} has {spec.num_classes} "
            "classes; download the file again."
        )
    return rows


def _examples(rows: np.ndarray, split: str, spec: Spec) -> Examples:
    fields = LABEL_FIELDS[spec.name]
    labels, pixels = rows[:, : len(fields)], rows[:, len(fields) :]
    images = pixels.reshape(-1, CHANNELS, SIDE, SIDE)  # red, green, blue planes

    def extra(index: int) -> Mapping[str, Any]:
        values = {field: int(labels[index, column]) for column, field in enumerate(fields)}
        return {**values, "id": f"{split}_{index:05d}"}

    return examples_from_arrays(
        images=images.transpose(0, 2, 3, 1), labels=labels[:, -1], extra=extra
    )


def _class_names(files: Files, spec: Spec) -> tuple[str, ...]:
    path = find_one(files, CLASS_NAME_FILES[spec.name])
    if path is None:
        return tuple(map(str, range(spec.num_classes)))
    return tuple(files.read_text(path).split())
