"""The folder of a run: one writer at a time, and one configuration for all its parts."""

import contextlib
import errno
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from metaopt.core.files import hold_lock, parse_json, read_plain, write_whole
from metaopt.meta import devices

CONFIG, LOCK = "config.json", "lock"


@contextlib.contextmanager
def only_writer(folder: Path):
    """Holds the lock of a run folder, which the operating system releases when the process ends.

    Args:
      folder: of the run.

    Raises:
      ValueError: when another process holds the lock.
    """
    with open(folder / LOCK, "w") as file:
        try:
            hold_lock(file, wait=False)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is training in this folder; wait for it, stop it, or "
                "choose another folder."
            ) from None
        yield


@contextlib.contextmanager
def claimed(folder: Path, config: Mapping[str, Any], overwrite: bool, resume_changed: bool):
    """Holds the folder for a run with `config`; see `only_writer` and `claim`.

    Process 0 claims the folder. If it fails, every process raises, so that none waits forever.

    Args:
      folder: of the run; it is made if needed.
      config: as in `claim`.
      overwrite: as in `claim`.
      resume_changed: as in `claim`.

    Raises:
      ValueError: when `only_writer` or `claim` raises in process 0.
      OSError: when process 0 cannot make or write the folder.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if jax.process_index() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(folder))
                claim(folder, config, overwrite, resume_changed)
            except (ValueError, OSError) as error:
                problem = error
        failed = devices.anywhere(problem is not None)[0]
        if problem is not None:
            raise problem
        if failed:
            raise ValueError(f"{folder}: process 0 could not start the run; see its message.")
        yield


def claim(
    folder: Path, config: Mapping[str, Any], overwrite: bool, resume_changed: bool = False
) -> None:
    """Writes the configuration of a run, or checks that the run in the folder has the same one.

    Args:
      folder: of the run.
      config: plain JSON data.
      overwrite: delete a run that is there.
      resume_changed: accept a run with another configuration, with a warning that names the
        differences.

    Raises:
      ValueError: when the folder holds a run with another configuration, or one that cannot be
        read, and neither `overwrite` nor `resume_changed` allows it.
    """
    text = json.dumps(dict(config), indent=1, sort_keys=True)
    path = folder / CONFIG
    if path.exists() and not overwrite:
        differences = ", ".join(changes(_read(path), json.loads(text)))
        if not differences:
            return
        if not resume_changed:
            raise ValueError(
                f"{folder} holds a run with another configuration ({differences}). Resume with the "
                "old one, choose another folder, continue with the new one by --resume-changed "
                "True, or start afresh with --overwrite True."
            )
        warnings.warn(
            f"{folder}: continuing with a changed configuration ({differences}).", stacklevel=2
        )
    if overwrite:
        _clear(folder)
    write_whole(path, text.encode())


def _clear(folder: Path) -> None:
    """Deletes what is in the folder, except for the lock."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _read(path: Path) -> Any:
    try:
        return parse_json(read_plain(path))
    except ValueError as error:
        raise ValueError(
            f"{path}: not readable as JSON ({error}); choose another folder, or start afresh with "
            "--overwrite True."
        ) from None


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """The differences of plain JSON data by field: ``["method.sigma: 0.1 -> 0.2", ...]``.

    Of settings with different names (another optimizer, another method) only the name is listed.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{name}: {old!r} -> {new!r}"]
    keys = sorted(old.keys() | new.keys())
    if old.get("name") != new.get("name"):
        keys = ["name"]
    differences = []
    for key in keys:
        differences += changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return differences


@contextlib.contextmanager
def full_disk_explained(folder: Path):
    """Turns the error that a library raises on a full disk into an `OSError` with instructions.

    Args:
      folder: of the run.

    Raises:
      OSError: when the disk is full or a quota is used up.
    """
    try:
        yield
    except Exception as error:
        if not _no_space(error):
            raise
        raise OSError(
            errno.ENOSPC,
            "The disk is full (or a quota is used up), and the run stopped. Its last complete "
            "checkpoint is kept: make room and give the same command again",
            str(folder),
        ) from error


def _no_space(error: BaseException | None) -> bool:
    """Whether the error, or one of its causes, says that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
