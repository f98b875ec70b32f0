"""Files: atomic writes, locks, reading of untrusted files, and the cache folder."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt as _msvcrt

    msvcrt: Any = _msvcrt  # type checkers on other systems know none of its names

LARGEST = 1 << 30  # bytes; far above every file that metaopt writes
LOCK = "lock"
PART = re.compile(r".+\.\d+\.part")  # files of `write_whole`, before they get their name


def write_whole(path: Path, payload: bytes) -> None:
    """Writes a file atomically: a process killed at any time leaves the old file or the new one.

    Args:
      path: the file; missing folders are made.
      payload: its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:  # e.g. the disk is full
        part.unlink(missing_ok=True)
        raise


def sweep_parts(folder: Path) -> None:
    """Removes the files that killed processes left behind in `write_whole`.

    Args:
      folder: the folder of the files. Its lock is held: no other process writes in it.
    """
    for path in folder.iterdir():
        if PART.fullmatch(path.name) and path.is_file():
            path.unlink()


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


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """A context that only one process at a time can be in, for each folder; others are refused.

    Args:
      folder: the folder that the process writes in. It must exist.

    Raises:
      ValueError: when another process is in the context.
    """
    with open(folder / LOCK, "w") as file:
        try:
            hold_lock(file, wait=False)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is writing in this folder; wait for it, stop it, or "
                "choose another folder."
            ) from None
        yield


def hold_lock(file: IO[str], *, wait: bool) -> None:
    """Locks an open file until it is closed or the process ends, however it ends.

    A forked child, for example of a data loader, does not hold the lock.

    Args:
      file: the lock file, open for writing.
      wait: whether to wait while another process holds the lock.

    Raises:
      BlockingIOError: when another process holds the lock and `wait` is False.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        _closed_in_children().add(file)
        return
    while True:
        try:
            return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:  # LK_LOCK gives up after ten seconds: try again
            if not wait:
                raise BlockingIOError("another process holds the lock") from None


@cache
def _closed_in_children() -> weakref.WeakSet[IO[str]]:
    """The open locks, which forked children close.

    A lock belongs to the open file, which a forked child shares: without this, a child that
    outlives its parent would keep the folder locked. A hook cannot be unregistered, so there is one
    for all locks.
    """
    held: weakref.WeakSet[IO[str]] = weakref.WeakSet()

    def close_all():
        for file in list(held):
            file.close()

    os.register_at_fork(after_in_child=close_all)
    return held


def check_only_ours(folder: Path, ours: re.Pattern[str], marks: Collection[str]) -> None:
    """Checks that a folder holds only what metaopt wrote, before `remove_contents`.

    Args:
      folder: the folder.
      ours: matches the names of all files that metaopt writes in such a folder, those in a folder
        of it as ``"folder/name"``. ``"folder/"`` is an empty one.
      marks: the entries by which such a folder is recognised; one of them is there.

    Raises:
      ValueError: when it holds anything else; names the first such entry.
    """
    names = []
    for path in sorted(folder.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        inside = sorted(child.name for child in path.iterdir()) or [""] if is_folder else []
        names += [f"{path.name}/{name}" for name in inside] if is_folder else [path.name]
    names = [name for name in names if name != LOCK and not PART.fullmatch(name)]
    foreign = [name for name in names if not ours.fullmatch(name)]
    if foreign or (names and not any((folder / mark).exists() for mark in marks)):
        raise ValueError(
            f"{folder}: holds {(foreign or names)[0]!r}, which metaopt did not write there, so "
            "nothing is overwritten; move it away, or choose another folder."
        )


def remove_contents(folder: Path) -> None:
    """Deletes what is in a folder, except for its lock; see `check_only_ours`."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


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
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path}: its {size} bytes are too many; at most {most}.")
        try:
            payload = file.read(size + 1)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
        if len(payload) > size:  # also files of the kernel, which have no size
            raise ValueError(f"{path}: grows while it is read; try again.")
        return payload


@contextmanager
def open_plain(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a regular file from an untrusted source; never waits, as opening a pipe does.

    Args:
      path: the file.

    Yields:
      The binary file.

    Raises:
      ValueError: when the file is missing, a symbolic link, a pipe, or a device.
    """
    # What is opened is what is checked: a path could change between a check and the opening.
    flags = [getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")]
    try:
        if path.is_symlink():  # also where there is no O_NOFOLLOW
            raise OSError(errno.ELOOP, "")
        descriptor = os.open(path, os.O_RDONLY | sum(flags))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(
                f"{path}: is a symbolic link; put the file itself in its place."
            ) from None
        if path.exists() and not path.is_file():  # a socket; on Windows, a folder
            raise ValueError(
                f"{path}: is not a plain file; put the file itself in its place."
            ) from None
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path}: is not a plain file; put the file itself in its place.")
        file = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    with file:
        yield file


def write_sealed(path: Path, payload: bytes) -> None:
    """Writes a file of a cache: a checksum, then the content; atomically.

    Args:
      path: the file; missing folders are made.
      payload: its content.
    """
    write_whole(path, hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def read_sealed(path: Path) -> bytes | None:
    """Reads what `write_sealed` wrote.

    Args:
      path: the file.

    Returns:
      The content; None when the file is missing or its content has not the checksum.
    """
    with suppress(ValueError):
        digest, _, payload = read_plain(path).partition(b"\n")
        if hashlib.sha256(payload).hexdigest().encode() == digest:
            return payload
    return None


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
    """The folder of caches: ``METAOPT_CACHE_DIR``, or else ``metaopt`` in the user's cache.

    It is made if needed.

    Raises:
      OSError: when it cannot be made or written, as where the home folder is read-only.
    """
    folder = user_cache(os.environ.get("METAOPT_CACHE_DIR"))
    make_writable(folder, "the folder of caches", "METAOPT_CACHE_DIR")
    return folder


def make_writable(folder: Path, what: str, variable: str) -> None:
    """Makes a folder if needed.

    Args:
      folder: the folder.
      what: what it is, for the message.
      variable: the environment variable that names another one.

    Raises:
      OSError: when it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cause = "" if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
    except OSError as error:
        cause = error.strerror
    if cause:
        raise OSError(
            f"{folder}: {what} cannot be written ({cause}); set {variable} to one that can."
        )


def user_cache(chosen: str | None) -> Path:
    """The folder `chosen`, or else ``metaopt`` in the user's cache."""
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "metaopt"
