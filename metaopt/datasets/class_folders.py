"""Reader of images in class-named folders: ``train/CLASS/*.png``, optional ``val/`` and ``test/``.

Without a ``train`` folder, the class folders lie at the top. Tiny ImageNet has this layout with two
exceptions: the classes of its ``val`` folder are listed in ``val_annotations.txt``, and its
``test`` folder has no labels.
"""

import difflib
import io
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metaopt.core.extras import optional_imports
from metaopt.datasets import tfds_records
from metaopt.datasets.catalog import Spec
from metaopt.datasets.sources import Example, Examples, Files, ImageSet, find_one

if TYPE_CHECKING:
    import PIL.Image

SPLIT_OF_FOLDER = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
FORMAT_OF_SUFFIX = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP"}
MAX_FILE_SIZE = 64 << 20  # bytes of one image file
GRAY_MODES = ("1", "L")
ANNOTATIONS = "val_annotations.txt"


class _ImageFile(NamedTuple):
    """An image file of a split.

    Attributes:
      path: of the file.
      class_name: the folders between that of the split and the file, joined by ``/``.
    """

    path: str
    class_name: str


def read(files: Files, spec: Spec) -> ImageSet | None:
    """Finds the images and their classes. The images are decoded when they are iterated over.

    Args:
      files: the source.
      spec: the data set.

    Returns:
      The images, or None when there is no image file.

    Raises:
      ValueError: when an image is in no class folder, or its class does not occur in training;
        while iterating also when an image cannot be decoded, or differs from the first one in
        size or in having colours.
    """
    paths = [path for path in files.sizes if _is_image(PurePosixPath(path))]
    if not paths:
        return None
    image_files = _find_classes(files, paths)
    if "train" not in image_files:
        raise ValueError(f"{files.where}: holds no training images; name their folder train.")
    class_names = _class_names(files, spec, image_files["train"])
    shape = spec.shape or _read_shape(files, image_files["train"][0].path)
    splits = {}
    for split, of_split in image_files.items():
        labels = _labels(files, of_split, class_names)
        splits[split] = _examples(
            files, spec=spec, split=split, image_files=of_split, labels=labels, shape=shape
        )
    return ImageSet(splits=splits, shape=shape, class_names=class_names)  # type: ignore


def _is_image(path: PurePosixPath) -> bool:
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in FORMAT_OF_SUFFIX and not is_hidden


def _find_classes(files: Files, paths: Sequence[str]) -> dict[str, list[_ImageFile]]:
    """Split -> its images, in the order of their paths."""
    top, has_split_folders = _find_top(paths)
    annotations = _read_annotations(files)
    image_files: dict[str, list[_ImageFile]] = {}
    for path in paths:
        parts = PurePosixPath(path).relative_to(top).parts
        if has_split_folders:
            split = SPLIT_OF_FOLDER.get(parts[0], "")
            parts = parts[1:]
        else:
            split = "train"
        if annotations and split == "test":
            continue  # Tiny ImageNet's test images have no labels
        if annotations and split == "validation":
            class_name = annotations.get(PurePosixPath(path).name, "")
        else:
            class_name = "/".join(parts[:-1])
        if not split or not class_name:
            raise ValueError(
                f"{files.where}/{path}: in no class folder; images lie in train/CLASS/, val/CLASS/ "
                "and test/CLASS/."
            )
        image_files.setdefault(split, []).append(_ImageFile(path=path, class_name=class_name))
    return image_files


def _find_top(paths: Sequence[str]) -> tuple[PurePosixPath, bool]:
    """The folder of the split folders and True; or the folder of the class folders and False."""
    parents = {PurePosixPath(path).parent for path in paths}
    train_folders = {
        folder
        for parent in parents
        for folder in (parent, *parent.parents)
        if folder.name == "train"
    }
    if train_folders:
        return min(train_folders, key=lambda folder: len(folder.parts)).parent, True
    common = os.path.commonpath([f"/{parent.parent}" for parent in parents])
    return PurePosixPath(common).relative_to("/"), False


def _read_annotations(files: Files) -> Mapping[str, str]:
    """File name of a validation image -> class."""
    path = find_one(files, ANNOTATIONS)
    if path is None:
        return {}
    with files.open(path) as file:
        rows = [line.split("\t") for line in file.read().decode().splitlines()]
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _class_names(files: Files, spec: Spec, train: Sequence[_ImageFile]) -> tuple[str, ...]:
    """The names in TensorFlow Datasets, or else the class folders of training, sorted."""
    official = tfds_records.class_names(spec)
    if official:
        return official
    folders = tuple(sorted({image.class_name.split("/")[0] for image in train}))
    if spec.num_classes and len(folders) != spec.num_classes:
        raise ValueError(
            f"{files.where}: {len(folders)} class folders under train, but {spec.name} has "
            f"{spec.num_classes} classes."
        )
    return folders


def _labels(
    files: Files, image_files: Sequence[_ImageFile], class_names: Sequence[str]
) -> list[int]:
    # Some official names (of Places) contain a /, for which folders have a -.
    label_of_name = {name.replace("/", "-"): label for label, name in enumerate(class_names)}
    labels = []
    for path, class_name in image_files:
        first_folder = class_name.split("/")[0]
        label = label_of_name.get(class_name.replace("/", "-"), label_of_name.get(first_folder))
        if label is None:
            close = difflib.get_close_matches(first_folder, class_names, n=3) or class_names[:3]
            raise ValueError(
                f"{files.where}/{path}: {first_folder!r} is none of the {len(class_names)} classes "
                f"({', '.join(close)}, ...)."
            )
        labels.append(label)
    return labels


def _examples(
    files: Files,
    *,
    spec: Spec,
    split: str,
    image_files: Sequence[_ImageFile],
    labels: Sequence[int],
    shape: tuple[int, ...],
) -> Examples:
    def iterate() -> Iterator[Example]:
        for index, (image_file, label) in enumerate(zip(image_files, labels, strict=True)):
            yield Example(
                image=_decode(files, image_file.path, shape),
                label=label,
                extra=_extra_fields(spec, split=split, index=index, path=image_file.path),
            )

    return Examples(count=len(image_files), iterate=iterate)


def _extra_fields(spec: Spec, *, split: str, index: int, path: str) -> Mapping[str, Any]:
    """The further fields of TensorFlow Datasets, as far as class folders can give them."""
    fields = {
        "cifar10": {"id": f"{split}_{index:05d}"},
        "cifar100": {"id": f"{split}_{index:05d}", "coarse_label": -1},  # -1: unknown
        "svhn_cropped": {"id": f"{split}_{index:06d}"},
        "places365_small": {"filename": path},
    }
    return fields.get(spec.name, {})


def _read_shape(files: Files, path: str) -> tuple[int, int, int]:
    with _open_image(files, path) as image:
        return image.height, image.width, 1 if image.mode in GRAY_MODES else 3


def _decode(files: Files, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of shape `shape`. The size in the header is checked before memory is allocated."""
    where = f"{files.where}/{path}"
    height, width, channels = shape
    with _open_image(files, path) as image:
        if image.size != (width, height):
            raise ValueError(
                f"{where}: {image.width}x{image.height} pixels, expected {width}x{height}; "
                "resize all images to that size."
            )
        if channels == 1 and image.mode not in GRAY_MODES:
            raise ValueError(f"{where}: a colour image, but the first one is gray.")
        return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(shape)


@contextmanager
def _open_image(files: Files, path: str) -> Iterator["PIL.Image.Image"]:
    """Opens an image without decoding it; errors while it is open name the file."""
    with optional_imports("data", needed_by="metaopt.datasets"):
        import PIL.Image

    where = f"{files.where}/{path}"
    if files.sizes[path] > MAX_FILE_SIZE:
        raise ValueError(f"{where}: {files.sizes[path]} bytes are too many for one image.")
    try:
        with files.open(path) as file:
            payload = io.BytesIO(file.read())
        with warnings.catch_warnings():  # the size is checked before anything is decoded
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(payload, formats=tuple(set(FORMAT_OF_SUFFIX.values())))
        with image:
            yield image
    except (
        OSError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
        PIL.Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{where}: no readable image ({error}); replace or remove it.") from None
