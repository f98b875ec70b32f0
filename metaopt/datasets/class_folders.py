"""Reader of images in class-named folders: ``train/CLASS/*.png``, optional ``val/`` and ``test/``.

Without a ``train`` folder, the class folders lie at the top. Tiny ImageNet has this layout with two
exceptions: the classes of its ``val`` folder are listed in ``val_annotations.txt``, and its
``test`` folder has no labels.
"""

import difflib
import io
import os
import warnings
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

# Names of the folders of splits, in any case.
SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
FORMAT_OF_SUFFIX = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".pgm": "PPM",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
# Files beside images that hold no examples. Any other file in a class folder is refused, so that
# none is left out without a word.
NOTES = (".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf", "")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
MAX_FILE_SIZE = 64 << 20  # bytes of one image file
# Modes of Pillow.
GRAY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
ORIENTATION = 0x0112  # the EXIF tag; from 5 on, rows and columns are exchanged
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
      ValueError: when an image is in no class folder, its class does not occur in training, a
        class folder holds no image, or a file that is neither an image nor a note; while iterating
        also when an image cannot be decoded as it is shown (transparency, several frames, more
        than 16 bits), or differs from the first one in size or in having colours.
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


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in FORMAT_OF_SUFFIX and not _is_hidden(path)


def _find_classes(files: Files, paths: Sequence[str]) -> dict[str, list[_ImageFile]]:
    """Split -> its images, in the order of their paths."""
    top, has_split_folders = _find_top(paths)
    annotations = _read_annotations(files)
    _check_class_folders(files, paths, top, has_split_folders, annotated=bool(annotations))
    image_files: dict[str, list[_ImageFile]] = {}
    for path in paths:
        parts = PurePosixPath(path).relative_to(top).parts
        if has_split_folders:
            split = SPLIT_OF_FOLDER.get(parts[0].lower(), "")
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
        if SPLIT_OF_FOLDER.get(folder.name.lower()) == "train"
    }
    if train_folders:
        return min(train_folders, key=lambda folder: (len(folder.parts), folder)).parent, True
    common = os.path.commonpath([f"/{parent.parent}" for parent in parents])
    return PurePosixPath(common).relative_to("/"), False


def _check_class_folders(
    files: Files,
    paths: Sequence[str],
    top: PurePosixPath,
    has_split_folders: bool,
    *,
    annotated: bool,
) -> None:
    """Checks that no class, and no file in a class folder, is left out without a word."""
    folders = [PurePosixPath(folder) for folder in files.folders]
    below = [folder.relative_to(top).parts for folder in folders if folder.is_relative_to(top)]
    below = [parts for parts in below if parts and not _is_hidden(PurePosixPath(*parts))]
    split_folders: dict[str, str] = {}
    for name in sorted({parts[0] for parts in below}):
        split = SPLIT_OF_FOLDER.get(name.lower())
        if split and not has_split_folders:
            raise ValueError(
                f"{files.where}: holds the folder {(top / name).as_posix()}, but no folder train; "
                "name the folder of training images train."
            )
        if split and split_folders.setdefault(split, name) != name:
            raise ValueError(
                f"{files.where}: both {split_folders[split]} and {name} are folders of the split "
                f"{split}; keep one."
            )
    depth = 2 if has_split_folders else 1
    # Where annotations tell the classes (Tiny ImageNet), only training has class folders.
    splits = [name for split, name in split_folders.items() if split == "train" or not annotated]
    class_folders = {
        top.joinpath(*parts)
        for parts in below
        if len(parts) == depth and (not has_split_folders or parts[0] in splits)
    }
    with_images = {parent for path in paths for parent in PurePosixPath(path).parents}
    if empty := sorted(class_folders - with_images):
        raise ValueError(
            f"{files.where}/{empty[0]}: a class folder without an image that can be read "
            f"({', '.join(FORMAT_OF_SUFFIX)}); add its images, or remove the folder."
        )
    for path in map(PurePosixPath, files.sizes):
        is_note = path.suffix.lower() in NOTES or path.name.lower() in SYSTEM_FILES
        if is_note or _is_image(path) or _is_hidden(path):
            continue
        if class_folders & set(path.parents):
            raise ValueError(
                f"{files.where}/{path}: neither an image that can be read "
                f"({', '.join(FORMAT_OF_SUFFIX)}) nor a note; convert or remove it."
            )


def _read_annotations(files: Files) -> Mapping[str, str]:
    """File name of a validation image -> class."""
    path = find_one(files, ANNOTATIONS)
    if path is None:
        return {}
    rows = [line.split("\t") for line in files.read_text(path).splitlines()]
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
    label_of_name = {name: label for label, name in enumerate(class_names)}
    # Some official names (of Places) contain a /, for which one folder has a -.
    label_of_folder = {name.replace("/", "-"): label for name, label in label_of_name.items()}
    labels = []
    for path, class_name in image_files:
        parts = class_name.split("/")
        nested = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
        label = next((label_of_name[name] for name in nested if name in label_of_name), None)
        label = label_of_folder.get(parts[0]) if label is None else label
        if label is None:
            close = difflib.get_close_matches(parts[0], class_names, n=3) or class_names[:3]
            raise ValueError(
                f"{files.where}/{path}: {parts[0]!r} is none of the {len(class_names)} classes "
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
        channels = 1 if image.mode in GRAY_MODES or _is_deep_gray(image) else 3
        if _is_turned(image):
            return image.width, image.height, channels
        return image.height, image.width, channels


def _is_deep_gray(image: "PIL.Image.Image") -> bool:
    """Whether it has 16 bits per pixel; Pillow reads some such files into 32."""
    is_wide = image.mode == "I" and image.format in ("PNG", "PPM")
    return image.mode.startswith("I;16") or is_wide


def _is_turned(image: "PIL.Image.Image") -> bool:
    """Whether rows and columns are exchanged before the image is shown."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # to look further, Pillow would decode the image
    return image.getexif().get(ORIENTATION, 1) >= 5


def _decode(files: Files, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 of shape `shape`. The size in the header is checked before memory is allocated."""
    from PIL import ImageOps

    where = f"{files.where}/{path}"
    height, width, channels = shape
    with _open_image(files, path) as image:
        size = image.size[::-1] if _is_turned(image) else image.size
        if size != (width, height):
            raise ValueError(
                f"{where}: {size[0]}x{size[1]} pixels, expected {width}x{height}; resize all "
                "images to that size."
            )
        is_deep = _is_deep_gray(image)
        if channels == 1 and image.mode in COLOUR_MODES:
            raise ValueError(f"{where}: a colour image, but the first one is gray.")
        if image.mode not in (*GRAY_MODES, *COLOUR_MODES) and not is_deep:
            raise ValueError(
                f"{where}: its pixels are of the mode {image.mode}; convert it to 8 bits."
            )
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"{where}: holds {image.n_frames} frames; save each as a file.")  # type: ignore
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:  # type: ignore
            raise ValueError(f"{where}: has transparent pixels; put it on a background.")
        shown = ImageOps.exif_transpose(image)
        if is_deep:  # its higher 8 bits, as Pillow does with 16-bit colour images
            pixels = (np.asarray(shown) >> 8).astype(np.uint8)
            return np.repeat(pixels[..., None], channels, axis=2)
        return np.asarray(shown.convert("L" if channels == 1 else "RGB")).reshape(shape)


@contextmanager
def _open_image(files: Files, path: str) -> Iterator["PIL.Image.Image"]:
    """Opens an image without decoding it; errors while it is open name the file."""
    with optional_imports("data", needed_by="metaopt.datasets"):
        import PIL.Image

    where = f"{files.where}/{path}"
    try:
        payload = io.BytesIO(files.read(path, MAX_FILE_SIZE))
        with warnings.catch_warnings():  # the size is checked before anything is decoded
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(payload, formats=tuple(set(FORMAT_OF_SUFFIX.values())))
        with image:
            yield image
    except (
        OSError,
        SyntaxError,
        PIL.Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{where}: no readable image ({error}); replace or remove it.") from None
