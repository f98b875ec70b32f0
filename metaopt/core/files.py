"""Files that are never seen half-written, files of unknown origin, and where caches are kept."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt as _msvcrt

    msvcrt: Any = _msvcrt  # type checkers elsewhere know none of its names

LARGEST = 1 << 30  # bytes; far above every file that metaopt writes


def write_whole(path: Path, payload: bytes) -> None:
    """Writes a file so that a process killed at any time leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(payload)
    os.replace(part, path)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Waits until no other process is within it with the same file; a killed one lets go."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        hold_lock(file, wait=True)
        yield


def hold_lock(file: IO[str], *, wait: bool) -> None:
    """Locks an open file until it is closed, or its process ends, however it ends.

    Raises: BlockingIOError: another process holds the lock, and `wait` is False.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    while True:
        try:  # LK_LOCK gives up after ten seconds
            return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:
            if not wait:
                raise BlockingIOError("another process holds the lock") from None


def read_plain(path: Path, most: int = LARGEST) -> bytes:
    """The bytes of a plain file that anyone may have written.

    Raises: ValueError: it is missing, a link, a pipe, a device, or larger than `most` bytes.
    """
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise ValueError(f"{path}: is a symbolic link; put the file itself in its place.")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is not a plain file; put the file itself in its place.")
        if status.st_size > most:
            raise ValueError(f"{path}: its {status.st_size} bytes are too many; at most {most}.")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None


def parse_json(payload: bytes) -> Any:
    """The JSON in UTF-8 that `payload` holds.

    Raises: ValueError: it is something else, nested too deeply, or has a key twice.
    """
    try:
        return json.loads(payload.decode(), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return found


def cache_folder() -> Path:
    """``METAOPT_CACHE_DIR``, or else ``metaopt`` in the user's cache folder."""
    if chosen := os.environ.get("METAOPT_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaopt"
