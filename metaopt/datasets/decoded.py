"""The images of a prepared set as plain uint8 arrays beside its records: quick to load.

``decoded/{split}-x.npy`` and ``-y.npy``, with ``manifest.json``: sha256 of these files and of the
records that they were made from. Both are checked whenever the arrays are loaded.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from metaopt.core.checks import check_file_name, check_json
from metaopt.datasets.examples import Example, Reading

FOLDER, MANIFEST = "decoded", "manifest.json"
CONTENT = {"shape": [int], "class_names": [str], "examples": {str: int}, "note": str}
CONTENT |= {"source": {str: str}, "arrays": {str: str}}
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> images [n, H, W, C], labels [n]


@contextmanager
def recording(
    folder: Path, shape: tuple[int, ...], counts: Mapping[str, int]
) -> Iterator[Callable[[str, Example], None]]:
    """Gives a function ``(split, example)`` that appends to the arrays of a set in `folder`."""
    (folder / FOLDER).mkdir()
    labels: dict[str, list[int]] = {split: [] for split in counts}
    with ExitStack() as stack:
        images = {}
        for split, count in counts.items():
            file = stack.enter_context(open(folder / FOLDER / f"{split}-x.npy", "wb"))
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            images[split] = file

        def record(split: str, example: Example) -> None:
            images[split].write(example.image.tobytes())
            labels[split].append(example.label)

        yield record
    for split, values in labels.items():
        np.save(folder / FOLDER / f"{split}-y.npy", np.array(values, np.int32))


def seal(folder: Path, source: Path, reading: Reading) -> None:
    """Writes the manifest of the arrays in `folder`, made from the records in `source`."""
    content = {
        "shape": reading.shape,
        "class_names": reading.class_names,
        "examples": {split: examples.count for split, examples in reading.splits.items()},
        "note": reading.note,
        "source": _digests(sorted(path for path in source.iterdir() if path.is_file())),
        "arrays": _digests(sorted((folder / FOLDER).glob("*.npy"))),
    }
    (folder / FOLDER / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def manifest(folder: Path) -> dict[str, Any] | None:
    """What `seal` wrote, or None where it is not there or not whole."""
    try:
        content = json.loads((folder / FOLDER / MANIFEST).read_text())
        check_json(MANIFEST, content, CONTENT)
        for name in (*content["source"], *content["arrays"]):
            check_file_name(MANIFEST, name)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content


def check_source(folder: Path, fix: str) -> None:
    """Raises `ValueError` with `fix` where the records are not those the arrays were made from."""
    for name, digest in (manifest(folder) or {"source": {}})["source"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {fix}")
        if _digests([folder / name])[name] != digest:
            raise ValueError(f"{folder / name} has changed since it was prepared; {fix}")


def load(folder: Path) -> Arrays | None:
    """The arrays, or None where they are missing or not as they were written."""
    known = manifest(folder)
    if known is None:
        return None
    paths = [folder / FOLDER / name for name in known["arrays"]]
    if any(not path.is_file() for path in paths) or _digests(paths) != known["arrays"]:
        return None
    arrays = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in paths}
    splits = sorted({name[:-2] for name in arrays})
    return {split: (arrays[f"{split}-x"], arrays[f"{split}-y"]) for split in splits}


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    result = {}
    for path in paths:
        with open(path, "rb") as file:
            result[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return result
