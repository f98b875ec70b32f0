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
    """Holds the run folder's lock; it is released when the process ends, however it ends."""
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

    Process 0 does it for all. Where it cannot, every process raises `ValueError`, so that none
    waits for another for ever.
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
            raise ValueError(f"{folder}: process 0 could not begin; its own message says why.")
        yield


def claim(
    folder: Path, config: Mapping[str, Any], overwrite: bool, resume_changed: bool = False
) -> None:
    """Makes the run folder, or checks that the run in it has the same configuration."""
    text = json.dumps(dict(config), indent=1, sort_keys=True)
    path = folder / CONFIG
    if path.exists() and not overwrite:
        changed = changes(_read(path), json.loads(text))
        if not changed:
            return
        told = ", ".join(changed)
        if not resume_changed:
            raise ValueError(
                f"{folder} holds a run with another configuration ({told}). Resume with the old "
                "one, choose another folder, go on with the new one by --resume-changed True, or "
                "start afresh with --overwrite True."
            )
        warnings.warn(f"{folder}: going on with a changed configuration ({told}).", stacklevel=2)
    for old in folder.iterdir() if overwrite else ():
        if old.name != LOCK:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_whole(path, text.encode())


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
    """Turns whatever a full disk made a library raise into one `OSError` that says what to do."""
    try:
        yield
    except Exception as error:
        if not _no_space(error):
            raise
        raise OSError(
            errno.ENOSPC,
            "The disk is full (or a quota is used up), so that the run stopped. Its last complete "
            "checkpoint is kept: make room and give the same command again",
            str(folder),
        ) from error


def _no_space(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
