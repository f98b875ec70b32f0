"""Writes real images of digits in the formats of real data sets, and reads such files."""

import gzip
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from metaopt.datasets.catalog import SPECS, own_spec
from metaopt.datasets.sources import Example, ImageSet, open_source


def digit_images(side: int = 8, channels: int = 1, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's first digits, enlarged: uint8 ``[n, side, side, channels]`` and labels."""
    bunch = load_digits()
    images = (bunch.images[:n] * 15).astype(np.uint8)
    images = images.repeat(side // 8, axis=1).repeat(side // 8, axis=2)
    tint = np.array([1.0, 0.6, 0.3])[:channels]  # channels differ, so that a wrong order shows
    return (images[..., None] * tint).astype(np.uint8), bunch.target[:n].astype(np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array, written after the format's own description."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], *, gz=True) -> Path:
    """Writes files named as MNIST's; `splits`: train and t10k -> images ``[n, H, W]``, labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, (images, labels) in splits.items():
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name, payload = f"{prefix}-{kind}-ubyte", idx_bytes(array)
            if gz:
                (folder / f"{name}.gz").write_bytes(gzip.compress(payload, 1))
            else:
                (folder / name).write_bytes(payload)
    return folder


def write_digits_idx(folder: Path, *, gz=True, train=300, test=60) -> Path:
    """Writes the first digits as IDX files: a set of the user's own."""
    x, y = digit_images()
    x = x[..., 0]
    last = slice(train, train + test)
    return write_idx(folder, {"train": (x[:train], y[:train]), "t10k": (x[last], y[last])}, gz=gz)


def write_class_folders(
    folder: Path, images: np.ndarray, labels: np.ndarray, names, suffix=".png"
) -> None:
    """Writes ``folder/NAME/00000.png`` ..., in the order of `images`."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / names[label] / f"{i:05d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(path)


def read_all(
    reader: ModuleType, source: Path, name: str = "mine"
) -> tuple[ImageSet, dict[str, list[Example]]]:
    """What a reader finds in `source`, and all examples of each split."""
    with open_source(source) as files:
        image_set = reader.read(files, SPECS.get(name) or own_spec(name))
        assert image_set is not None
        examples = {split: list(part.iterate()) for split, part in image_set.splits.items()}
    for split, part in image_set.splits.items():
        assert len(examples[split]) == part.count
    return image_set, examples


def assert_holds(examples: list[Example], images: np.ndarray, labels) -> None:
    """Asserts that examples have exactly these images and labels, in this order."""
    np.testing.assert_array_equal(np.stack([example.image for example in examples]), images)
    np.testing.assert_array_equal([example.label for example in examples], labels)
