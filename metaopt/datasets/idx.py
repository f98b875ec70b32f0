"""IDX files, the format of MNIST: a big-endian header, then the array's bytes; gzip or raw."""

import gzip
import hashlib
import math
import struct
import zlib
from typing import BinaryIO

import numpy as np

from metaopt.datasets.examples import Reading, from_arrays
from metaopt.datasets.sources import Files, only
from metaopt.datasets.specs import CONTENT, Spec

STEMS = {"train": ("train",), "test": ("t10k", "test")}  # split -> beginnings of its files
MAGIC = {"images": 0x00000803, "labels": 0x00000801}  # unsigned bytes, 3 axes or 1
DEFLATE = 1032  # at most so many bytes come out of one byte of gzip
LARGEST = 8 << 30  # bytes of one array; far above every set of this format


def read(files: Files, spec: Spec) -> Reading | None:
    """The four IDX files of a set; None where there is not one of them.

    Raises:
      ValueError: a file is missing, damaged, of another type or size than its header says, or, for
        a set whose content is known, not that content.
    """
    found = {(s, kind): _find(files, s, kind) for s in STEMS for kind in MAGIC}
    if not any(found.values()):
        return None
    if missing := [_official(*key) for key, name in found.items() if name is None]:
        raise ValueError(
            f"{files.where}: {' and '.join(missing)} (or .gz) missing; put it beside the others, "
            f"then give `metaopt data prepare {spec.name} --from {files.where}` again."
        )
    arrays = {key: _read_array(files, str(name), *key, spec) for key, name in found.items()}
    for split in STEMS:
        images, labels = arrays[split, "images"], arrays[split, "labels"]
        if len(images) != len(labels) or len(images) == 0:
            raise ValueError(
                f"{files.where}/{found[split, 'labels']}: {len(labels)} labels for the "
                f"{len(images)} images of {found[split, 'images']}; get both files again."
            )
    shape = arrays["train", "images"].shape[1:]
    if 0 in shape:
        raise ValueError(f"{files.where}/{found['train', 'images']}: images of no size, {shape}.")
    if arrays["test", "images"].shape[1:] != shape:
        raise ValueError(
            f"{files.where}/{found['test', 'images']}: images of "
            f"{arrays['test', 'images'].shape[1:]}, but those of training are {shape}."
        )
    splits = {s: from_arrays(arrays[s, "images"][..., None], arrays[s, "labels"]) for s in STEMS}
    classes = 1 + max(int(arrays[split, "labels"].max()) for split in STEMS)
    note = "sha256 of the four files' content is the official one" if spec.name in CONTENT else ""
    return Reading(splits, (*shape, 1), tuple(map(str, range(classes))), note)


def _official(split: str, kind: str) -> str:
    return f"{STEMS[split][0]}-{kind}-idx{MAGIC[kind] & 0xFF}-ubyte"


def _find(files: Files, split: str, kind: str) -> str | None:
    # Some programs unpack train-images-idx3-ubyte.gz as train-images.idx3-ubyte.
    end = f"idx{MAGIC[kind] & 0xFF}-ubyte"
    names = [f"{stem}-{kind}{mark}{end}" for stem in STEMS[split] for mark in "-."]
    return only(files, *names, *(f"{name}.gz" for name in names))


def _read_array(files: Files, name: str, split: str, kind: str, spec: Spec) -> np.ndarray:
    """uint8 ``[n, H, W]`` or ``[n]``; the header is checked before memory is taken."""
    path = f"{files.where}/{name}"
    again = f"get the file again, then `metaopt data prepare {spec.name} --from {files.where}`."
    try:
        with files.open(name) as raw:
            file: BinaryIO = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw  # type: ignore
            header, shape = _header(file, path, kind, again)
            most = files.sizes[name] * (DEFLATE if name.endswith(".gz") else 1)
            if math.prod(shape) > min(most, LARGEST):
                raise ValueError(
                    f"{path}: cut short: its {files.sizes[name]} bytes cannot hold the {shape} "
                    f"that its header announces; {again}"
                )
            payload = file.read(math.prod(shape))
            if len(payload) < math.prod(shape):
                raise ValueError(
                    f"{path}: cut short: {len(payload)} of the {math.prod(shape)} bytes that its "
                    f"header announces; {again}"
                )
            if file.read(1):
                raise ValueError(f"{path}: longer than its header announces; {again}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); {again}") from None
    digest = hashlib.sha256(header + payload).hexdigest()
    _check_content(digest, path, _official(split, kind), spec, again)
    return np.frombuffer(payload, np.uint8).reshape(shape)


def _header(file: BinaryIO, path: str, kind: str, again: str) -> tuple[bytes, tuple[int, ...]]:
    axes = MAGIC[kind] & 0xFF
    header = file.read(4 + 4 * axes)
    if len(header) < 4 + 4 * axes:
        raise ValueError(f"{path}: cut short: no whole header; {again}")
    magic, *shape = struct.unpack(f">{1 + axes}I", header)
    if magic != MAGIC[kind]:
        raise ValueError(
            f"{path}: begins with 0x{magic:08x}, IDX {kind} begin with 0x{MAGIC[kind]:08x}; {again}"
        )
    return header, tuple(shape)


def _check_content(digest: str, path: str, official: str, spec: Spec, again: str) -> None:
    if spec.name not in CONTENT or CONTENT[spec.name][official] == digest:
        return
    for other, contents in CONTENT.items():
        if contents[official] == digest:
            raise ValueError(f"{path}: this is {other}; give `metaopt data prepare {other} ...`.")
    raise ValueError(
        f"{path}: not the official content of {spec.name}: sha256 (uncompressed) is {digest}, "
        f"expected {CONTENT[spec.name][official]}; {again}"
    )
