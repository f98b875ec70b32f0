"""What a reader of files gives: examples in order, one at a time, so that memory stays small."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """Attributes: image: uint8 ``[H, W, C]``; label; extra: further fields of a stock set."""

    image: np.ndarray
    label: int
    extra: Mapping[str, Any] = {}


class Examples(NamedTuple):
    """A split. Attributes: count: how many; rows: starts a pass over them."""

    count: int
    rows: Callable[[], Iterator[Example]]


class Reading(NamedTuple):
    """What the files hold.

    Attributes:
      splits: TensorFlow Datasets' name of the split (train, validation, test) -> examples.
      shape: of each image, ``(H, W, C)``.
      class_names: name of each label.
      note: how far the content was checked, for people.
    """

    splits: dict[str, Examples]
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    note: str = ""


def from_arrays(
    images: np.ndarray, labels: np.ndarray, extra: Callable[[int], Mapping[str, Any]] = lambda i: {}
) -> Examples:
    """A split of images ``[n, H, W, C]`` and labels ``[n]`` that fit into memory."""

    def rows() -> Iterator[Example]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Example(image, int(label), extra(i))

    return Examples(len(labels), rows)
