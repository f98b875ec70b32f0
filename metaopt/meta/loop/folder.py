"""The folder of a run: one writer at a time, and one configuration for all its parts."""

import contextlib
import errno
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from metaopt.core.files import (
    check_only_ours,
    only_writer,
    parse_json,
    read_plain,
    remove_contents,
    sweep_parts,
    write_whole,
)
from metaopt.meta import devices
from metaopt.meta.loop.logs import METRICS, TENSORBOARD
from metaopt.meta.loop.states import DAMAGED, STATES

CONFIG, EXPORT = "config.json", "export"
WARM_START = "warm-start.jsonl"  # metrics of the run that this one starts from
# All that a run writes in its folder, and its export.
OURS = re.compile(
    rf"{CONFIG}|{METRICS}|{WARM_START}|({STATES}|{DAMAGED})/(\d+.*)?"
    rf"|{TENSORBOARD}/(events\.out\.tfevents\..*)?"
    rf"|{EXPORT}/(spec\.json|theta(-[0-9a-f]{{64}})?\.safetensors|.*\.\d+\.part)?"
)


class Claim(NamedTuple):
    """The folder of a run, which this process holds.

    Attributes:
      starts: whether the run starts here; False: it goes on from what is in the folder.
      begin: to call when the run can begin: nothing in the folder changes before. It deletes a run
        that is overwritten, and writes the configuration.
    """

    starts: bool
    begin: Callable[[], None]


@contextlib.contextmanager
def claimed(
    folder: Path, config: Mapping[str, Any], overwrite: bool, resume_changed: bool
) -> Iterator[Claim]:
    """Holds the folder for a run with `config`.

    Process 0 claims the folder. If it fails, every process raises, so that none waits forever.

    Args:
      folder: of the run; it is made if needed.
      config: plain JSON data.
      overwrite: delete a run that is there.
      resume_changed: see `check_unchanged`.

    Yields:
      The claim.

    Raises:
      ValueError: when another process holds the folder, it holds a run with another configuration,
        or it is to be overwritten and holds what no run writes.
      OSError: when process 0 cannot make or write the folder.
    """
    with contextlib.ExitStack() as stack:
        starts = False

        def claim() -> None:
            nonlocal starts
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(folder))
            if overwrite:
                check_only_ours(folder, OURS, marks=(CONFIG, STATES))
            elif (folder / CONFIG).exists():
                check_unchanged(folder, _read(folder / CONFIG), config, resume_changed)
            starts = overwrite or not (folder / STATES).exists()
            if starts and not overwrite and (folder / METRICS).exists():
                raise ValueError(
                    f"{folder}: holds {METRICS}, but no checkpoints ({STATES}) to go on from; "
                    "choose another folder, or start afresh with --overwrite True."
                )

        def begin() -> None:
            if overwrite:
                remove_contents(folder)
            else:
                sweep_parts(folder)
            write_whole(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True).encode())

        _by_process_0(folder, claim)
        yield Claim(starts=devices.anywhere(starts)[0], begin=lambda: _by_process_0(folder, begin))


def _by_process_0(folder: Path, function: Callable[[], None]) -> None:
    """Calls a function in process 0, while the others wait; if it fails, every process raises."""
    problem = None
    if jax.process_index() == 0:
        try:
            function()
        except (ValueError, OSError) as error:
            problem = error
    failed = devices.anywhere(problem is not None)[0]
    if problem is not None:
        raise problem
    if failed:
        raise ValueError(f"{folder}: process 0 could not start the run; see its message.")


def check_unchanged(folder: Path, old: Any, new: Mapping[str, Any], resume_changed: bool) -> None:
    """Checks that a run goes on with the configuration that it had.

    Args:
      folder: of the run.
      old: configuration of the run in the folder.
      new: plain JSON data; the configuration of its continuation.
      resume_changed: accept another configuration, with a warning that names the differences.

    Raises:
      ValueError: when they differ, and `resume_changed` is False.
    """
    differences = ", ".join(changes(old, json.loads(json.dumps(dict(new)))))
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


def check_restored(
    folder: Path, saved: Mapping[str, Any], config: Mapping[str, Any], resume_changed: bool
) -> None:
    """Compares with the configuration in a checkpoint where the folder has lost its own.

    Args:
      folder: of the run.
      saved: configuration that was saved with the checkpoint.
      config: configuration of the continuation.
      resume_changed: see `check_unchanged`.

    Raises:
      ValueError: see `check_unchanged`.
    """
    if not (folder / CONFIG).exists():
        check_unchanged(folder, saved, config, resume_changed)
        warnings.warn(
            f"{folder / CONFIG} is missing; it is written again from the checkpoint.", stacklevel=2
        )


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
