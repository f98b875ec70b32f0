"""Reader of SVHN's cropped digits: MATLAB files with X ``[32, 32, 3, n]`` and y ``[n, 1]``.

Labels are 1..10; 10 stands for the digit 0.
"""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np

from metaopt.datasets.catalog import Spec
from metaopt.datasets.sources import MAX_EXPANSION, Files, ImageSet, examples_from_arrays, find_one

SHAPE = (32, 32, 3)


def read(files: Files, spec: Spec) -> ImageSet | None:
    """Reads train_32x32.mat and test_32x32.mat.

    Args:
      files: the source.
      spec: of svhn_cropped.

    Returns:
      The images, or None when neither file is there.

    Raises:
      ValueError: when one file is missing, damaged, or holds other arrays.
    """
    paths = {split: find_one(files, f"{split}_32x32.mat") for split in ("train", "test")}
    if not any(paths.values()):
        return None
    splits = {}
    for split, path in paths.items():
        if path is None:
            raise ValueError(
                f"{files.where}: {split}_32x32.mat is missing; put it beside the other, then run "
                f"`metaopt data prepare {spec.name} --from {files.where}` again."
            )
        images, labels = _read_arrays(files, path)
        splits[split] = examples_from_arrays(
            images=images,
            labels=labels,
            extra=lambda index, split=split: {"id": f"{split}_{index:06d}"},
        )
    return ImageSet(splits=splits, shape=SHAPE, class_names=tuple(map(str, range(10))))


def _read_arrays(files: Files, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, 32, 32, 3]`` and labels ``[n]`` in 0..9."""
    from scipy.io import loadmat

    where = f"{files.where}/{path}"
    payload = files.read(path)
    try:
        expanded = _expanded_size(payload, MAX_EXPANSION * len(payload))
        if expanded > MAX_EXPANSION * len(payload):
            raise ValueError(f"expands more than {MAX_EXPANSION} times")
        content: dict[str, Any] = loadmat(BytesIO(payload), variable_names=("X", "y"))
        images, labels = content["X"], content["y"].reshape(-1)
    except Exception as error:  # scipy raises errors of many types on damaged bytes
        raise ValueError(f"{where}: damaged ({error!r}); download it again.") from None
    images_fit = images.dtype == np.uint8 and images.ndim == 4 and images.shape[:3] == SHAPE
    if not images_fit or len(labels) != images.shape[3] or not np.isin(labels, range(1, 11)).all():
        raise ValueError(
            f"{where}: expected X uint8 [32, 32, 3, n] and y [n] in 1..10, got X {images.dtype} "
            f"{list(images.shape)} and {len(labels)} labels; download it again."
        )
    return np.moveaxis(images, -1, 0), labels % 10


def _expanded_size(payload: bytes, most: int) -> int:
    """The size of the compressed elements of a MATLAB 5 file; stops once it exceeds `most`.

    After a header of 128 bytes, each element has a type and a size (4 bytes each, little-endian),
    then its content; type 15 is a zlib stream.
    """
    total, position = 0, 128
    while position + 8 <= len(payload) and total <= most:
        kind, size = struct.unpack_from("<II", payload, position)
        position += 8
        if kind == 15:
            stream = zlib.decompressobj()
            rest = payload[position : position + size]
            while rest and total <= most:
                total += len(stream.decompress(rest, 1 << 20))
                rest = stream.unconsumed_tail
        position += size
    return total
