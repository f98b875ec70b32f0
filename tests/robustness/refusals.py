"""What it means that a bad input is refused, for all tests of bad input.

A refusal is an error that metaopt raises on purpose: a `ValueError`, `TypeError` or `OSError` whose
message names the argument or the file, and whose last frame lies in metaopt. It comes within a time
limit, runs nothing that the input holds, and leaves every file as it was.
"""

import contextlib
import hashlib
import pickle
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import metaopt

LIBRARY = Path(metaopt.__file__).parent
SECONDS = 30  # a refusal takes milliseconds; a call that takes this long hangs


def bad_inputs(table: dict[str, tuple]) -> pytest.MarkDecorator:
    """Parametrises a test by a table ``{name: (..., bad, match)}``.

    `match` is a regular expression for the message.
    """
    count = len(next(iter(table.values())))
    names = ("bad", "match") if count == 2 else ("target", "bad", "match")
    return pytest.mark.parametrize(names, table.values(), ids=table)


def refused(call: Callable[[], Any], match: str, *folders: Path) -> None:
    """Asserts that `call` is refused with a matching message; `folders` must stay as they are."""
    before = [fingerprint(folder) for folder in folders]
    with within(SECONDS), pytest.raises((ValueError, TypeError, OSError)) as caught:
        call()
    message = str(caught.value)
    assert re.search(match, message, re.DOTALL), f"{match!r} is not in {message!r}"
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert LIBRARY in Path(last.filename).parents, f"raised in {last.filename}:{last.lineno}"
    assert len(message) < 1500
    assert [fingerprint(folder) for folder in folders] == before


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Turns a hang into a failure."""

    def stop(number, frame):
        pytest.fail(f"not refused within {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fingerprint(folder: Path) -> dict[str, str]:
    """The content of every file below `folder`, by path; links by their targets."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            contents[name] = f"link to {path.readlink()}"
        elif path.is_file() and path.stat().st_size < 1 << 24:
            contents[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            contents[name] = f"mode {path.stat().st_mode}, size {path.stat().st_size}"
    return contents


class Bomb:
    """Pickled, it writes the file `marker` when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "executed"))


def bomb(marker: Path) -> bytes:
    """A pickle that would write `marker`."""
    return pickle.dumps(Bomb(marker))
