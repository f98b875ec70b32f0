"""Images in class-named folders: ``train/CLASS/*.png``, optional ``val/`` and ``test/``.

Tiny ImageNet's layout is one of them, but for its ``val`` folder, whose classes stand in
``val_annotations.txt``, and its ``test`` folder, which has no labels. Without a ``train`` folder
the classes themselves lie at the top.
"""

import difflib
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metaopt.core.extras import optional_imports
from metaopt.datasets import tfrecords
from metaopt.datasets.examples import Example, Examples, Reading
from metaopt.datasets.sources import Files, only
from metaopt.datasets.specs import Spec

if TYPE_CHECKING:
    from PIL import Image

SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"test": "test"}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP"}
LARGEST_FILE = 64 << 20  # bytes of one image file
GRAY = ("1", "L")
ANNOTATIONS = "val_annotations.txt"


class _Image(NamedTuple):
    path: str
    class_name: str  # its folders below that of the split, with /


def read(files: Files, spec: Spec) -> Reading | None:
    """The images, or None where no file is one.

    Raises:
      ValueError: a class that is not known from training, an image in no class folder, an
        unreadable image (when it is read), or one of another size than the rest.
    """
    images = [path for path in files.sizes if PurePosixPath(path).suffix.lower() in FORMATS]
    images = [path for path in images if not _hidden(path)]
    if not images:
        return None
    splits = _listed(files, images)
    if "train" not in splits:
        raise ValueError(f"{files.where}: holds no training images; name their folder train.")
    names = _class_names(files, spec, splits["train"])
    labels = lambda listed: _labels(files, listed, names)
    shape = spec.shape or _shape(files, splits["train"][0].path)
    examples = {
        split: Examples(len(listed), _reader(files, spec, listed, labels(listed), shape, split))
        for split, listed in splits.items()
    }
    return Reading(examples, shape, names)  # type: ignore


def _hidden(path: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts)


def _listed(files: Files, images: Sequence[str]) -> dict[str, list[_Image]]:
    """Split -> its images, in the order of their names."""
    top, has_splits = _top(images)
    annotated = _annotations(files)
    splits: dict[str, list[_Image]] = {}
    for path in images:
        inner = PurePosixPath(path).relative_to(top).parts
        split = SPLITS.get(inner[0], "") if has_splits else "train"
        below = inner[1:] if has_splits else inner
        if annotated and split == "test":
            continue  # Tiny ImageNet's test images have no labels
        if annotated and split == "validation":
            class_name = annotated.get(inner[-1], "")
        else:
            class_name = "/".join(below[:-1])
        if not split or not class_name:
            raise ValueError(
                f"{files.where}/{path}: in no class folder; images lie in train/CLASS/, val/CLASS/ "
                "and test/CLASS/."
            )
        splits.setdefault(split, []).append(_Image(path, class_name))
    return splits


def _top(images: Sequence[str]) -> tuple[PurePosixPath, bool]:
    """The folder of the splits, True; or the folder of the classes, False."""
    parents = {PurePosixPath(folder) for folder in {os.path.dirname(path) for path in images}}
    trains = {p for parent in parents for p in (parent, *parent.parents) if p.name == "train"}
    if trains:
        return min(trains, key=lambda train: len(train.parts)).parent, True
    common = os.path.commonpath([f"/{parent.parent}" for parent in parents])
    return PurePosixPath(common).relative_to("/"), False


def _annotations(files: Files) -> Mapping[str, str]:
    """File name of a validation image -> class."""
    path = only(files, ANNOTATIONS)
    if path is None:
        return {}
    with files.open(path) as file:
        lines = [line.split("\t") for line in file.read().decode().splitlines() if line]
    return {line[0]: line[1] for line in lines if len(line) > 1}


def _class_names(files: Files, spec: Spec, listed: Sequence[_Image]) -> tuple[str, ...]:
    """The official names; or the folders of training, sorted."""
    official = tfrecords.class_names(spec) if spec.official else ()
    folders = tuple(sorted({image.class_name.split("/")[0] for image in listed}))
    if official or not spec.num_classes or len(folders) == spec.num_classes:
        return official or folders
    raise ValueError(
        f"{files.where}: {len(folders)} class folders under train, but {spec.name} has "
        f"{spec.num_classes} classes."
    )


def _labels(files: Files, listed: Sequence[_Image], names: Sequence[str]) -> list[int]:
    """Some official classes (of Places) have a / in their name, which people write as -."""
    label_of = {name.replace("/", "-"): label for label, name in enumerate(names)}
    labels = []
    for path, folders in listed:
        whole, first = folders.replace("/", "-"), folders.split("/")[0]
        label = label_of.get(whole, label_of.get(first))
        if label is None:
            near = difflib.get_close_matches(first, names, n=3) or names[:3]
            raise ValueError(
                f"{files.where}/{path}: {first!r} is none of the {len(names)} classes "
                f"({', '.join(near)}, ...)."
            )
        labels.append(label)
    return labels


def _shape(files: Files, path: str) -> tuple[int, int, int]:
    with _opened(files, path) as image:
        return (image.height, image.width, 1 if image.mode in GRAY else 3)


def _reader(
    files: Files,
    spec: Spec,
    listed: Sequence[_Image],
    labels: Sequence[int],
    shape: tuple[int, ...],
    split: str,
) -> Callable[[], Iterator[Example]]:
    def rows() -> Iterator[Example]:
        for i, (image, label) in enumerate(zip(listed, labels, strict=True)):
            extra = _extra(spec, split, i, image.path)
            yield Example(_decode(files, image.path, shape), label, extra)

    return rows


def _extra(spec: Spec, split: str, i: int, path: str) -> Mapping[str, Any]:
    """The further fields of the official sets, where files in folders can give them."""
    fields = {
        "cifar10": {"id": f"{split}_{i:05d}"},
        "cifar100": {"id": f"{split}_{i:05d}", "coarse_label": -1},  # -1: unknown
        "svhn_cropped": {"id": f"{split}_{i:06d}"},
        "places365_small": {"filename": path},
    }
    return fields.get(spec.name, {})


def _decode(files: Files, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 `shape`; the size is read from the header, before memory is taken."""
    where = f"{files.where}/{path}"
    height, width, channels = shape
    with _opened(files, path) as image:
        if image.size != (width, height):
            raise ValueError(
                f"{where}: {image.width}x{image.height} pixels, expected {width}x{height}; "
                "bring all images to that size."
            )
        if channels == 1 and image.mode not in GRAY:
            raise ValueError(f"{where}: a colour image, but the first one is gray.")
        return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(shape)


@contextmanager
def _opened(files: Files, path: str) -> Iterator["Image.Image"]:
    """The image, not yet decoded; what goes wrong with it is said with its name."""
    with optional_imports("data", needed_by="metaopt.datasets"):
        from PIL import Image
    where = f"{files.where}/{path}"
    unreadable = (
        OSError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
        Image.DecompressionBombError,
    )
    if files.sizes[path] > LARGEST_FILE:
        raise ValueError(f"{where}: {files.sizes[path]} bytes are too many for one image.")
    try:
        with files.open(path) as file:
            payload = io.BytesIO(file.read())
        with warnings.catch_warnings():  # the size is checked before anything is decoded
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(payload, formats=tuple(set(FORMATS.values())))
        with image:
            yield image
    except unreadable as error:
        raise ValueError(f"{where}: no readable image ({error}); replace or remove it.") from None
