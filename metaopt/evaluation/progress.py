"""Progress of an evaluation: a bar per task on a terminal, a line per optimizer elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from typing import TYPE_CHECKING

from metaopt.core.extras import optional_imports

if TYPE_CHECKING:
    from rich.console import Console

# (name, optimizers left including this one) -> function to call with the windows done so far
Begin = Callable[[str, int], Callable[[int], None]]


@contextlib.contextmanager
def progress(title: str, windows: int, console: "Console | None" = None) -> Iterator[Begin]:
    """Shows the progress of one task.

    Args:
      title: title of the task.
      windows: windows of each optimizer's run; the bar counts them.
      console: where to write, by default stderr. A console that is no terminal gets lines, and so
        does a worker process, since several of them share the terminal.

    Yields:
      A function to call when an optimizer begins; see `Begin`.
    """
    with optional_imports("train", needed_by="metaopt.evaluation"):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    console = console or Console(stderr=True, soft_wrap=True)
    if not console.is_terminal or parent_process() is not None:
        yield lambda name, left: _print_line(console, f"{title}: {name}")
        return
    bar = Progress(
        TextColumn("{task.fields[title]}", style="dim", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )
    task = bar.add_task("", total=None, title=title)

    def begin(name: str, left: int) -> Callable[[int], None]:
        done = bar.tasks[0].completed
        bar.update(task, description=name, total=done + left * windows)
        return lambda count: bar.update(task, completed=done + count)

    with bar:
        yield begin


def _print_line(console: "Console", text: str) -> Callable[[int], None]:
    console.print(text, markup=False, highlight=False)
    return lambda count: None
