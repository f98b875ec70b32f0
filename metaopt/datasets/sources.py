"""Where files are read from: a folder or a zip file, neither of which can lead out of itself.

A zip file is never unpacked: its entries are read in place. Nothing that is read is executed.
"""

import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

# Images and arrays shrink by far less than this; an archive that grows more is made to fill memory.
LARGEST_GROWTH = 100


class Files(NamedTuple):
    """The files of a folder or of a zip file.

    Attributes:
      where: the folder or the zip file, for messages.
      sizes: name relative to `where`, with ``/`` -> bytes; sorted by name.
      open: name -> binary file, to be closed by the caller.
    """

    where: Path
    sizes: dict[str, int]
    open: Callable[[str], BinaryIO]


@contextmanager
def open_source(path: Path) -> Iterator[Files]:
    """The files under `path`, a folder or a zip file.

    Raises:
      ValueError: `path` is neither, holds a symbolic link or a name that leads out of it, or is a
        zip file that would grow beyond reason.
    """
    if path.is_dir():
        yield _folder(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield _zip(path, archive)
    elif path.exists():
        raise ValueError(f"{path}: neither a folder nor a zip file; unpack it and give the folder.")
    else:
        raise ValueError(f"{path}: no such folder or zip file; --from names where the files lie.")


def _folder(path: Path) -> Files:
    sizes = {}
    for folder, folders, names in os.walk(path):
        for name in [*folders, *names]:
            file = Path(folder, name)
            mode = file.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise ValueError(f"{file}: a symbolic link; put the file itself in its place.")
            if stat.S_ISREG(mode):
                sizes[file.relative_to(path).as_posix()] = file.lstat().st_size
    return Files(path, dict(sorted(sizes.items())), lambda name: open(path / name, "rb"))


def _zip(path: Path, archive: zipfile.ZipFile) -> Files:
    sizes = {}
    for entry in archive.infolist():
        name, where = PurePosixPath(entry.filename), f"{path}: entry {entry.filename!r}"
        if name.is_absolute() or ".." in name.parts or "\\" in entry.filename:
            raise ValueError(f"{where} leads out of the archive; get the archive again.")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"{where} is a symbolic link; pack the file itself in its place.")
        if entry.filename in sizes:
            raise ValueError(f"{where} is there twice; pack each file once.")
        if not entry.is_dir():
            sizes[entry.filename] = entry.file_size
    expanded, packed = sum(sizes.values()), path.stat().st_size
    if expanded > LARGEST_GROWTH * packed:
        raise ValueError(
            f"{path}: {packed} bytes would expand to {expanded}, more than {LARGEST_GROWTH} times "
            "as many; that is no archive of images. Get it again, or unpack it and give the folder."
        )

    def open_entry(name: str) -> BinaryIO:
        return archive.open(name)  # type: ignore

    return Files(path, dict(sorted(sizes.items())), open_entry)


def only(files: Files, *names: str) -> str | None:
    """The one file whose last part is in `names`, at any depth; None where there is none."""
    found = [name for name in files.sizes if PurePosixPath(name).name in names]
    if len(found) > 1:
        raise ValueError(
            f"{files.where}: holds {' and '.join(found)}; give the folder of one of them."
        )
    return found[0] if found else None
