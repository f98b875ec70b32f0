"""The images of a prepared set as plain arrays beside its records, which load quickly.

The folder ``decoded`` holds ``{split}-x.npy`` (uint8 ``[n, H, W, C]``), ``{split}-y.npy`` (int32
``[n]``) and ``manifest.json``, with the sha256 of these files and of the records that they were
made from. Every load checks both.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.core.checks import check_file_name, check_json
from metaopt.core.extras import optional_imports
from metaopt.core.files import open_plain, parse_json, read_plain
from metaopt.datasets.sources import Example, ImageSet

FOLDER, MANIFEST = "decoded", "manifest.json"
MANIFEST_KIND = {
    "shape": [int],
    "class_names": [str],
    "examples": {str: int},
    "note": str,
    "source": {str: str},  # file of records -> sha256
    "arrays": {str: str},  # file of an array -> sha256
}
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images [n, H, W, C], labels [n]


@contextmanager
def writer(
    folder: Path, image_set: ImageSet, label: str
) -> Iterator[Callable[[str, Example], None]]:
    """Writes the arrays of a set one example at a time, and shows the progress.

    Args:
      folder: where ``decoded`` is made.
      image_set: the images to come.
      label: the text beside the progress bar.

    Yields:
      A function ``(split, example)`` that appends an example to its split.
    """
    (folder / FOLDER).mkdir()
    counts = {split: examples.count for split, examples in image_set.splits.items()}
    labels: dict[str, list[int]] = {split: [] for split in counts}
    with ExitStack() as stack:
        advance = stack.enter_context(_progress_bar(label, total=sum(counts.values())))
        files = {}
        for split, count in counts.items():
            file = stack.enter_context(open(folder / FOLDER / f"{split}-x.npy", "wb"))
            shape = (count, *image_set.shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            files[split] = file

        def write(split: str, example: Example) -> None:
            files[split].write(example.image.tobytes())
            labels[split].append(example.label)
            advance()

        yield write
    for split, values in labels.items():
        np.save(folder / FOLDER / f"{split}-y.npy", np.array(values, np.int32))


@contextmanager
def _progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr if that is a terminal; yields the function that advances it."""
    with optional_imports("data", needed_by="metaopt.datasets"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),  # as it is now: callers may redirect it meanwhile
        disable=not sys.stderr.isatty(),
    )
    with progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


def write_manifest(folder: Path, records: Path, image_set: ImageSet) -> None:
    """Writes the manifest of complete arrays.

    Args:
      folder: of the set, where ``decoded`` lies.
      records: the folder of the records that the arrays were made from.
      image_set: the images of the arrays.
    """
    manifest = {
        "shape": image_set.shape,
        "class_names": image_set.class_names,
        "examples": {split: examples.count for split, examples in image_set.splits.items()},
        "note": image_set.note,
        "source": _digests(sorted(path for path in records.iterdir() if path.is_file())),
        "arrays": _digests(sorted((folder / FOLDER).glob("*.npy"))),
    }
    (folder / FOLDER / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode() + b"\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the set in `folder`, or None when it is missing or damaged."""
    try:
        manifest = parse_json(read_plain(folder / FOLDER / MANIFEST))
        check_json(MANIFEST, manifest, MANIFEST_KIND)
        for name in (*manifest["source"], *manifest["arrays"]):
            check_file_name(MANIFEST, name)
    except ValueError:
        return None
    return manifest


def check_records(folder: Path, fix: str) -> None:
    """Checks that the records are still those that the arrays were made from.

    Args:
      folder: of the set.
      fix: the end of the message: what to do.

    Raises:
      ValueError: when a file is missing or has changed. Without a manifest nothing is checked.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    for name, digest in manifest["source"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {fix}")
        if _digests([folder / name])[name] != digest:
            raise ValueError(f"{folder / name} has changed since it was prepared; {fix}")


def load(folder: Path) -> Arrays | None:
    """Opens the arrays of the set in `folder`.

    Args:
      folder: of the set.

    Returns:
      The arrays, memory-mapped; None when they are missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    names = {split: (f"{split}-x.npy", f"{split}-y.npy") for split in manifest["examples"]}
    paths = [folder / FOLDER / name for pair in names.values() for name in pair]
    if any(not path.is_file() for path in paths) or _digests(paths) != manifest["arrays"]:
        return None

    def open_array(name: str) -> np.ndarray:
        return np.load(folder / FOLDER / name, mmap_mode="r", allow_pickle=False)

    return {split: (open_array(x), open_array(y)) for split, (x, y) in names.items()}


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> sha256."""
    digests = {}
    for path in paths:
        with open_plain(path) as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
