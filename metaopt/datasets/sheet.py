"""A contact sheet: some images of each class of a data set as one picture."""

from typing import TYPE_CHECKING

import numpy as np

from metaopt.core.extras import optional_imports
from metaopt.datasets.base import Dataset

if TYPE_CHECKING:
    from PIL import Image

PER_CLASS = 10
MOST_CLASSES = 20
LEAST_SIDE = 32  # pixels; smaller images are enlarged by whole factors


def contact_sheet(data: Dataset) -> "Image.Image":
    """The first training images of the first classes: a row per class, on white.

    Raises: ValueError: the examples are no images ``[n, H, W, C]`` with 1 or 3 channels.
    """
    with optional_imports("data", needed_by="metaopt data show --out"):
        from PIL import Image
    x, y = (np.asarray(data.splits["train"][key]) for key in ("x", "y"))
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise ValueError(f"data set {data.name!r} holds no images, but inputs of {x.shape[1:]}.")
    factor = -(-LEAST_SIDE // max(x.shape[1:3]))
    height, width = (side * factor + 1 for side in x.shape[1:3])
    rows = min(data.num_classes, MOST_CLASSES)
    sheet = np.full((rows * height + 1, PER_CLASS * width + 1, 3), 255, np.uint8)
    for row in range(rows):
        for column, index in enumerate(np.flatnonzero(y == row)[:PER_CLASS]):
            image = np.rint(x[index] * (255.0 * data.scale)).astype(np.uint8)
            tile = image.repeat(factor, axis=0).repeat(factor, axis=1)
            top, left = row * height + 1, column * width + 1
            sheet[top : top + height - 1, left : left + width - 1] = tile
    return Image.fromarray(sheet)
