"""SVHN's cropped digits as MATLAB files: X ``[32, 32, 3, n]``, y ``[n, 1]`` in 1..10 (10 is 0)."""

from io import BytesIO
from typing import Any

import numpy as np

from metaopt.datasets.examples import Reading, from_arrays
from metaopt.datasets.sources import Files, only
from metaopt.datasets.specs import Spec

SHAPE = (32, 32, 3)


def read(files: Files, spec: Spec) -> Reading | None:
    """train_32x32.mat and test_32x32.mat; None where there is neither.

    Raises: ValueError: one is missing, damaged, or holds other arrays.
    """
    found = {split: only(files, f"{split}_32x32.mat") for split in ("train", "test")}
    if not any(found.values()):
        return None
    splits = {}
    for split, path in found.items():
        if path is None:
            raise ValueError(
                f"{files.where}: {split}_32x32.mat is missing; put it beside the other, then give "
                f"`metaopt data prepare {spec.name} --from {files.where}` again."
            )
        images, labels = _arrays(files, path)
        ids = lambda i, split=split: {"id": f"{split}_{i:06d}"}
        splits[split] = from_arrays(images, labels, ids)
    return Reading(splits, SHAPE, tuple(map(str, range(10))))


def _arrays(files: Files, path: str) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    where = f"{files.where}/{path}"
    try:
        with files.open(path) as file:
            content: dict[str, Any] = loadmat(BytesIO(file.read()), variable_names=("X", "y"))
        images, labels = content["X"], content["y"].reshape(-1)
    except Exception as error:  # scipy raises whatever the damaged bytes lead it to
        raise ValueError(f"{where}: damaged ({error!r}); get it again.") from None
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[:3] == SHAPE
    if not fits or len(labels) != images.shape[3] or not np.isin(labels, range(1, 11)).all():
        raise ValueError(
            f"{where}: expected X uint8 [32, 32, 3, n] and y [n] in 1..10, got X {images.dtype} "
            f"{list(images.shape)} and {len(labels)} labels; get it again."
        )
    return np.moveaxis(images, -1, 0), labels % 10
