"""Reader of IDX files, the format of MNIST: a big-endian header, then the array's bytes.

The files may be compressed with gzip.
"""

import gzip
import hashlib
import math
import struct
import zlib
from typing import BinaryIO

import numpy as np

from metaopt.datasets.catalog import Spec
from metaopt.datasets.sources import MAX_BYTES, Files, ImageSet, examples_from_arrays, find_one

PREFIXES = {"train": ("train",), "test": ("t10k", "test")}  # split -> how its files' names begin
MAGIC = {"images": 0x00000803, "labels": 0x00000801}  # unsigned bytes; 3 axes, 1 axis
MAX_DEFLATE_RATIO = 1032  # one byte of gzip expands to at most so many

# sha256 of the uncompressed files (the gzip headers differ between distributions).
OFFICIAL_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
}


def read(files: Files, spec: Spec) -> ImageSet | None:
    """Reads the four IDX files of a data set.

    Args:
      files: the source.
      spec: the data set.

    Returns:
      The images, or None when none of the files is there.

    Raises:
      ValueError: when a file is missing, damaged, or of another type or size than its header says;
        or when it differs from the official content, where that is known.
    """
    paths = {(split, kind): _find(files, split, kind) for split in PREFIXES for kind in MAGIC}
    if not any(paths.values()):
        return None
    if missing := [_official_name(*key) for key, path in paths.items() if path is None]:
        raise ValueError(
            f"{files.where}: {' and '.join(missing)} (or .gz) missing; put it beside the others, "
            f"then run `metaopt data prepare {spec.name} --from {files.where}` again."
        )
    arrays = {
        (split, kind): _read_array(files, path=str(path), split=split, kind=kind, spec=spec)
        for (split, kind), path in paths.items()
    }
    for split in PREFIXES:
        images, labels = arrays[split, "images"], arrays[split, "labels"]
        if len(images) != len(labels) or len(images) == 0:
            raise ValueError(
                f"{files.where}/{paths[split, 'labels']}: {len(labels)} labels for the "
                f"{len(images)} images of {paths[split, 'images']}; download both files again."
            )
    shape = arrays["train", "images"].shape[1:]
    if 0 in shape:
        raise ValueError(f"{files.where}/{paths['train', 'images']}: images of no size, {shape}.")
    test_shape = arrays["test", "images"].shape[1:]
    if test_shape != shape:
        raise ValueError(
            f"{files.where}/{paths['test', 'images']}: images of {test_shape}, but those of "
            f"training are {shape}."
        )
    num_classes = 1 + max(int(arrays[split, "labels"].max()) for split in PREFIXES)
    is_official = spec.name in OFFICIAL_SHA256
    return ImageSet(
        splits={
            split: examples_from_arrays(
                images=arrays[split, "images"][..., None], labels=arrays[split, "labels"]
            )
            for split in PREFIXES
        },
        shape=(*shape, 1),
        class_names=tuple(map(str, range(num_classes))),
        note="sha256 of the four files' content is the official one" if is_official else "",
    )


def _official_name(split: str, kind: str) -> str:
    return f"{PREFIXES[split][0]}-{kind}-{_suffix(kind)}"


def _suffix(kind: str) -> str:
    num_axes = MAGIC[kind] & 0xFF
    return f"idx{num_axes}-ubyte"


def _find(files: Files, split: str, kind: str) -> str | None:
    # Some programs unpack train-images-idx3-ubyte.gz as train-images.idx3-ubyte.
    names = [
        f"{prefix}-{kind}{separator}{_suffix(kind)}"
        for prefix in PREFIXES[split]
        for separator in "-."
    ]
    return find_one(files, *names, *(f"{name}.gz" for name in names))


def _read_array(files: Files, *, path: str, split: str, kind: str, spec: Spec) -> np.ndarray:
    """uint8 ``[n, H, W]`` or ``[n]``. The header is checked before memory is allocated."""
    where = f"{files.where}/{path}"
    again = (
        "download the file again, then run "
        f"`metaopt data prepare {spec.name} --from {files.where}`."
    )
    try:
        with files.open(path) as raw:
            file: BinaryIO = raw
            max_bytes = files.sizes[path]
            if path.endswith(".gz"):
                file = gzip.GzipFile(fileobj=raw)  # type: ignore
                max_bytes *= MAX_DEFLATE_RATIO
            header, shape = _read_header(file, where=where, kind=kind, again=again)
            size = math.prod(shape)
            if size > min(max_bytes, MAX_BYTES):
                raise ValueError(
                    f"{where}: cut short: its {files.sizes[path]} bytes cannot hold the {shape} "
                    f"that its header announces; {again}"
                )
            payload = file.read(size)
            if len(payload) < size:
                raise ValueError(
                    f"{where}: cut short: {len(payload)} of the {size} bytes that its header "
                    f"announces; {again}"
                )
            if file.read(1):
                raise ValueError(f"{where}: longer than its header announces; {again}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{where}: damaged or cut short ({error}); {again}") from None
    _check_content(
        sha256=hashlib.sha256(header + payload).hexdigest(),
        where=where,
        official_name=_official_name(split, kind),
        spec=spec,
        again=again,
    )
    return np.frombuffer(payload, np.uint8).reshape(shape)


def _read_header(
    file: BinaryIO, *, where: str, kind: str, again: str
) -> tuple[bytes, tuple[int, ...]]:
    """The header's bytes and the shape that it announces."""
    num_axes = MAGIC[kind] & 0xFF
    header = file.read(4 + 4 * num_axes)
    if len(header) < 4 + 4 * num_axes:
        raise ValueError(f"{where}: cut short: no whole header; {again}")
    magic, *shape = struct.unpack(f">{1 + num_axes}I", header)
    if magic != MAGIC[kind]:
        raise ValueError(
            f"{where}: begins with 0x{magic:08x}, IDX {kind} begin with 0x{MAGIC[kind]:08x}; "
            f"{again}"
        )
    return header, tuple(shape)


def _check_content(*, sha256: str, where: str, official_name: str, spec: Spec, again: str) -> None:
    """Checks the content of a set whose official content is known."""
    if spec.name not in OFFICIAL_SHA256 or OFFICIAL_SHA256[spec.name][official_name] == sha256:
        return
    for other, digests in OFFICIAL_SHA256.items():
        if digests[official_name] == sha256:
            raise ValueError(f"{where}: this is {other}; run `metaopt data prepare {other} ...`.")
    raise ValueError(
        f"{where}: not the official content of {spec.name}: sha256 (uncompressed) is {sha256}, "
        f"expected {OFFICIAL_SHA256[spec.name][official_name]}; {again}"
    )
