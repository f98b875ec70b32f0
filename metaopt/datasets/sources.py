"""What readers of data sets take and return: source files, and the labelled images in them.

Sources are untrusted. Neither a folder nor a zip file can lead out of itself; zip entries are read
in place, never unpacked; nothing that is read is executed.
"""

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from metaopt.core.files import open_plain

# Real archives of images and arrays expand by far less. One that expands more is built to fill the
# memory.
MAX_EXPANSION = 100
MAX_BYTES = 8 << 30  # of one file of arrays; far above those of every set that is read whole
MAX_TEXT_BYTES = 64 << 20  # of a file of names
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class Files(NamedTuple):
    """The files of a folder or of a zip file.

    Attributes:
      where: the folder or the zip file, for messages.
      sizes: path relative to `where`, with ``/`` -> size in bytes; sorted by path.
      open: path -> context of the binary file.
      folders: paths of the folders, empty ones included; sorted.
    """

    where: Path
    sizes: dict[str, int]
    open: Callable[[str], AbstractContextManager[BinaryIO]]
    folders: tuple[str, ...]

    def read(self, path: str, most: int = MAX_BYTES) -> bytes:
        """The content of a file.

        Args:
          path: of the file.
          most: the largest size that is read, in bytes.

        Raises:
          ValueError: when the file is larger, or damaged.
        """
        if self.sizes[path] > most:
            raise ValueError(
                f"{self.where}/{path}: its {self.sizes[path]} bytes are too many; at most {most}."
            )
        with self.open(path) as file:
            payload = file.read(most + 1)
        if len(payload) != self.sizes[path]:
            raise ValueError(f"{self.where}/{path}: changes while it is read; try again.")
        return payload

    def read_text(self, path: str) -> str:
        """The content of a file of names.

        Args:
          path: of the file.

        Raises:
          ValueError: when the file is not in UTF-8, larger than `MAX_TEXT_BYTES`, or damaged.
        """
        try:
            return self.read(path, MAX_TEXT_BYTES).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}/{path}: not text in UTF-8 ({error}).") from None


@contextmanager
def open_source(path: Path) -> Iterator[Files]:
    """Opens a folder or a zip file of a data set's files.

    Args:
      path: the folder or the zip file.

    Yields:
      Its files.

    Raises:
      ValueError: when `path` is neither, contains a symbolic link, a pipe or a device, a folder
        that cannot be read, or a name that leads out of it, or is a zip file that is encrypted,
        damaged, compressed in another way than `COMPRESSIONS`, or expands more than
        `MAX_EXPANSION` times.
    """
    if path.is_dir():
        yield _open_folder(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{path}: a damaged zip file ({error}); download it again.") from None
        with archive:
            yield _open_zip(path, archive)
    elif path.exists():
        raise ValueError(f"{path}: neither a folder nor a zip file; unpack it and give the folder.")
    else:
        raise ValueError(f"{path}: no such folder or zip file; give the path of the files.")


def _open_folder(path: Path) -> Files:
    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror}).")

    sizes, all_folders = {}, []
    for folder, folders, names in os.walk(path, onerror=fail):
        for name in [*folders, *names]:
            file = Path(folder, name)
            status = file.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise ValueError(f"{file}: a symbolic link; put the file itself in its place.")
            relative = file.relative_to(path).as_posix()
            if stat.S_ISDIR(status.st_mode):
                all_folders.append(relative)
            elif stat.S_ISREG(status.st_mode):
                sizes[relative] = status.st_size
            else:
                raise ValueError(f"{file}: a pipe or a device; remove it.")
    return Files(
        where=path,
        sizes=dict(sorted(sizes.items())),
        open=lambda name: open_plain(path / name),
        folders=tuple(sorted(all_folders)),
    )


def _open_zip(path: Path, archive: zipfile.ZipFile) -> Files:
    sizes, folders = {}, set()
    for entry in archive.infolist():
        name = PurePosixPath(entry.filename)
        where = f"{path}: entry {entry.filename!r}"
        if name.is_absolute() or ".." in name.parts or "\\" in entry.filename:
            raise ValueError(f"{where} leads out of the archive; download the archive again.")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"{where} is a symbolic link; pack the file itself in its place.")
        if entry.filename in sizes:
            raise ValueError(f"{where} occurs twice; pack each file once.")
        if entry.flag_bits & 1:
            raise ValueError(f"{where} is encrypted; unpack the archive, and give the folder.")
        if entry.compress_type not in COMPRESSIONS:
            raise ValueError(
                f"{where} is compressed by method {entry.compress_type}, which is not known here; "
                "unpack the archive, and give the folder."
            )
        if not entry.is_dir():
            sizes[entry.filename] = entry.file_size
        parents = name.parents if not entry.is_dir() else (name, *name.parents)
        folders.update(str(parent) for parent in parents)
    expanded, packed = sum(sizes.values()), path.stat().st_size
    if expanded > MAX_EXPANSION * packed:
        raise ValueError(
            f"{path}: {packed} bytes would expand to {expanded}, more than {MAX_EXPANSION} times "
            "as many, unlike any archive of images; download it again, or give an unpacked folder."
        )

    @contextmanager
    def open_entry(name: str) -> Iterator[BinaryIO]:
        try:
            with archive.open(name) as file:
                yield file  # type: ignore
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{path}/{name}: damaged ({error}); download it again.") from None

    return Files(
        where=path,
        sizes=dict(sorted(sizes.items())),
        open=open_entry,
        folders=tuple(sorted(folders - {"."})),
    )


def find_one(files: Files, *names: str) -> str | None:
    """Finds a file by its name, at any depth.

    Args:
      files: where to look.
      *names: the file's possible names, without folders.

    Returns:
      The path of the file, or None when there is none.

    Raises:
      ValueError: when there are several.
    """
    paths = [path for path in files.sizes if PurePosixPath(path).name in names]
    if len(paths) > 1:
        raise ValueError(
            f"{files.where}: holds {' and '.join(paths)}; give the folder of one of them."
        )
    return paths[0] if paths else None


class Example(NamedTuple):
    """A labelled image.

    Attributes:
      image: uint8 ``[H, W, C]``.
      label: the number of its class.
      extra: further fields that TensorFlow Datasets stores for this set.
    """

    image: np.ndarray
    label: int
    extra: Mapping[str, Any] = {}


class Examples(NamedTuple):
    """The examples of one split, read one at a time to save memory.

    Attributes:
      count: number of examples.
      iterate: starts a pass over them.
    """

    count: int
    iterate: Callable[[], Iterator[Example]]


class ImageSet(NamedTuple):
    """The labelled images that a reader finds in a source.

    Attributes:
      splits: name of the split in TensorFlow Datasets ("train", "validation", "test") -> examples.
      shape: of each image, ``(H, W, C)``.
      class_names: name of each label.
      note: how far the content was verified, for people; may be empty.
    """

    splits: dict[str, Examples]
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    note: str = ""


def examples_from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    extra: Callable[[int], Mapping[str, Any]] = lambda index: {},
) -> Examples:
    """Examples of arrays in memory.

    Args:
      images: uint8 ``[n, H, W, C]``.
      labels: int ``[n]``.
      extra: index -> further fields of that example.

    Returns:
      The examples.
    """

    def iterate() -> Iterator[Example]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield Example(image=image, label=int(label), extra=extra(index))

    return Examples(count=len(labels), iterate=iterate)
