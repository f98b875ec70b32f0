"""`metaopt data prepare`: files as people have them -> a set that `load` reads."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from metaopt.datasets import cifar, decoded, folders, idx, store, svhn, tfrecords
from metaopt.datasets.examples import Example, Reading
from metaopt.datasets.progress import progress
from metaopt.datasets.sources import Files, open_source
from metaopt.datasets.specs import SPECS, Spec, own_spec

READERS: dict[str, Callable[[Files, Spec], Reading | None]] = {
    "idx": idx.read,
    "cifar": cifar.read,
    "svhn": svhn.read,
    "folders": folders.read,
}


class Prepared(NamedTuple):
    """Attributes: folder: of the set; fresh: False if it was there before; note: on its content."""

    folder: Path
    fresh: bool
    note: str


def prepare(
    name: str, source: Path | str, *, root: Path | None = None, overwrite: bool = False
) -> Prepared:
    """Writes the set `name` from the files in `source`, whole or not at all.

    A set that is there already is left alone. Two processes that prepare one set wait for each
    other; what a killed one left behind is removed by the next.

    Args:
      name: a set of `specs.SPECS` that is not embedded, or a name for a set of your own.
      source: a folder, or a zip file of one; read only.
      root: default: `store.data_root()`.
      overwrite: replace a set that is there.

    Raises:
      ValueError: the files are missing, damaged, not those of this set, or unsafe.
    """
    root, source = root or store.data_root(), Path(source)
    spec = SPECS.get(name) or own_spec(name)
    store.check_name(name)
    if name in SPECS and not spec.readers:
        raise ValueError(f"data set {name!r} is embedded; there is nothing to prepare.")
    with store.lock(root, name):
        there = store.find(root, name)
        if there and not overwrite:
            return Prepared(there, False, (decoded.manifest(there) or {}).get("note", ""))
        with store.workplace(root, name) as workplace, open_source(source) as files:
            reading = _read(files, spec)
            _check_space(root, reading)
            made = _write(spec, reading, workplace)
            folder = root / made.relative_to(workplace)
            store.publish(made, folder, aside=workplace / "replaced")
    return Prepared(folder, True, reading.note)


def _read(files: Files, spec: Spec) -> Reading:
    for reader in spec.readers:
        if reading := READERS[reader](files, spec):
            break
    else:
        raise ValueError(
            f"{files.where}: holds nothing that {spec.name} can be made of: {spec.files}."
        )
    if spec.shape and reading.shape != spec.shape:
        raise ValueError(
            f"{files.where}: images of {reading.shape}, but those of {spec.name} are {spec.shape}."
        )
    if spec.num_classes and len(reading.class_names) != spec.num_classes:
        raise ValueError(
            f"{files.where}: {len(reading.class_names)} classes, but {spec.name} has "
            f"{spec.num_classes}."
        )
    official = tfrecords.class_names(spec) if spec.official else ()
    return reading._replace(class_names=official or reading.class_names)


def _check_space(root: Path, reading: Reading) -> None:
    height, width, channels = reading.shape
    examples = sum(split.count for split in reading.splits.values())
    # Arrays as they are and, at worst, as many bytes again as PNG.
    needed, free = 2 * examples * height * width * channels, shutil.disk_usage(root).free
    if needed > free:
        raise ValueError(
            f"{root}: {examples} images of {reading.shape} may need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; make room, or set METAOPT_DATA_DIR to another disk."
        )


def _write(spec: Spec, reading: Reading, workplace: Path) -> Path:
    counts = {split: examples.count for split, examples in reading.splits.items()}
    arrays = workplace / "arrays"
    arrays.mkdir()
    with (
        progress(f"prepare {spec.name}", sum(counts.values())) as advance,
        decoded.recording(arrays, reading.shape, counts) as record,
    ):

        def on_example(split: str, example: Example) -> None:
            record(split, example)
            advance()

        made = tfrecords.write(spec, reading, workplace, on_example)
    (arrays / decoded.FOLDER).rename(made / decoded.FOLDER)
    decoded.seal(made, made, reading)
    return made
