"""Files: atomic writes, locks, reading of untrusted files, and the cache folder."""

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

    msvcrt: Any = _msvcrt  # type checkers on other systems know none of its names

LARGEST = 1 << 30  # bytes; far above every file that metaopt writes


def write_whole(path: Path, payload: bytes) -> None:
    """Writes a file atomically: a process killed at any time leaves the old file or the new one.

    Args:
      path: the file; missing folders are made.
      payload: its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(payload)
    os.replace(part, path)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """A context that only one process at a time can be in; others wait.

    Args:
      lock: the lock file; it and missing folders are made. A process that ends, however it ends,
        releases the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        hold_lock(file, wait=True)
        yield


def hold_lock(file: IO[str], *, wait: bool) -> None:
    """Locks an open file until it is closed or the process ends, however it ends.

    Args:
      file: the lock file, open for writing.
      wait: whether to wait while another process holds the lock.

    Raises:
      BlockingIOError: when another process holds the lock and `wait` is False.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    while True:
        try:
            return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:  # LK_LOCK gives up after ten seconds: try again
            if not wait:
                raise BlockingIOError("another process holds the lock") from None


def read_plain(path: Path, most: int = LARGEST) -> bytes:
    """Reads a regular file from an untrusted source.

    Args:
      path: the file.
      most: the largest size that is read, in bytes.

    Returns:
      Its content.

    Raises:
      ValueError: when the file is missing, a symbolic link, a pipe, a device, or too large.
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
    """Parses JSON in UTF-8.

    Args:
      payload: the document.

    Returns:
      What `json.loads` returns.

    Raises:
      ValueError: when `payload` is not JSON, is nested too deeply, or has a key twice.
    """
    try:
        return json.loads(payload.decode(), object_pairs_hook=_object_without_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
        entries[key] = value
    return entries


def cache_folder() -> Path:
    """The folder of caches: ``METAOPT_CACHE_DIR``, or else ``metaopt`` in the user's cache."""
    if chosen := os.environ.get("METAOPT_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaopt"
