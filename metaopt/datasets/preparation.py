"""`metaopt data prepare`: turns downloaded files into a data set that `load` finds."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from metaopt.datasets import cifar, class_folders, decoded_arrays, idx, store, svhn, tfds_records
from metaopt.datasets.catalog import SPECS, Spec, own_spec
from metaopt.datasets.sources import Files, ImageSet, open_source

READERS: dict[str, Callable[[Files, Spec], ImageSet | None]] = {
    "idx": idx.read,
    "cifar": cifar.read,
    "svhn": svhn.read,
    "class_folders": class_folders.read,
}


class PreparedSet(NamedTuple):
    """A data set on the disk.

    Attributes:
      folder: of the set.
      fresh: whether `prepare` has just written it; False when it was there before.
      note: how far its content was verified, for people; may be empty.
    """

    folder: Path
    fresh: bool
    note: str


def prepare(
    name: str, source: Path | str, *, root: Path | None = None, overwrite: bool = False
) -> PreparedSet:
    """Writes a data set from files, completely or not at all.

    Processes that prepare the same set wait for each other. What a killed process left behind is
    removed by the next one.

    Args:
      name: a set that is not embedded (see `specs`), or a new name for a set of your own.
      source: a folder of files, or a zip file of one; it is only read.
      root: the folder of prepared sets; default: `data_root`.
      overwrite: whether to replace a set that is already prepared; otherwise it is kept.

    Returns:
      Where the set is.

    Raises:
      ValueError: when the name is not legal, or the files are missing, damaged, not those of this
        set, or unsafe.
    """
    root, source = root or store.data_root(), Path(source)
    spec = SPECS.get(name) or own_spec(name)
    store.check_name(name)
    if name in SPECS and not spec.readers:
        raise ValueError(f"data set {name!r} is embedded; there is nothing to prepare.")
    with store.lock(root, name):
        folder = store.find(root, name)
        if folder and not overwrite:
            manifest = decoded_arrays.read_manifest(folder) or {}
            return PreparedSet(folder=folder, fresh=False, note=manifest.get("note", ""))
        with store.staging_folder(root, name) as staging, open_source(source) as files:
            image_set = _read(files, spec)
            _check_disk_space(root, image_set)
            staged = _write(spec, image_set, staging)
            folder = root / staged.relative_to(staging)
            store.publish(staged, folder, staging=staging, root=root)
    return PreparedSet(folder=folder, fresh=True, note=image_set.note)


def _read(files: Files, spec: Spec) -> ImageSet:
    """The images that the first fitting reader finds, checked against the spec."""
    for reader in spec.readers:
        if image_set := READERS[reader](files, spec):
            break
    else:
        raise ValueError(
            f"{files.where}: holds nothing that {spec.name} can be made of: {spec.files}."
        )
    if spec.shape and image_set.shape != spec.shape:
        raise ValueError(
            f"{files.where}: images of {image_set.shape}, but those of {spec.name} are "
            f"{spec.shape}."
        )
    if spec.num_classes and len(image_set.class_names) != spec.num_classes:
        raise ValueError(
            f"{files.where}: {len(image_set.class_names)} classes, but {spec.name} has "
            f"{spec.num_classes}."
        )
    return image_set._replace(class_names=tfds_records.class_names(spec) or image_set.class_names)


def _check_disk_space(root: Path, image_set: ImageSet) -> None:
    height, width, channels = image_set.shape
    num_examples = sum(examples.count for examples in image_set.splits.values())
    # The arrays and, at worst, as many bytes again as PNG.
    needed = 2 * num_examples * height * width * channels
    free = shutil.disk_usage(root).free
    if needed > free:
        raise ValueError(
            f"{root}: {num_examples} images of {image_set.shape} may need {needed / 1e9:.1f} GB, "
            f"but {free / 1e9:.1f} GB are free; make room, or set METAOPT_DATA_DIR to another disk."
        )


def _write(spec: Spec, image_set: ImageSet, staging: Path) -> Path:
    """Writes records and arrays in one pass over the images; returns the folder of the set."""
    arrays = staging / "arrays"
    arrays.mkdir()
    with decoded_arrays.writer(arrays, image_set, f"prepare {spec.name}") as write_example:
        folder = tfds_records.write(spec, image_set, staging, on_example=write_example)
    (arrays / decoded_arrays.FOLDER).rename(folder / decoded_arrays.FOLDER)
    decoded_arrays.write_manifest(folder, records=folder, image_set=image_set)
    return folder
