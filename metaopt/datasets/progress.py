"""The bar that long work on data sets shows on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from metaopt.core.extras import optional_imports


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr where that is a terminal; gives the function that advances it by one."""
    with optional_imports("data", needed_by="metaopt.datasets"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # The stream of now: what the caller redirects later is not ours.
    console, hidden = Console(file=sys.stderr), not sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
