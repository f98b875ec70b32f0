"""`metaopt zoo`: the trained optimizers that ship with the package."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from metaopt import zoo

BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class ZooJob:
    """List the trained optimizers that ship with the package, or show the card of one.

    Attributes:
      action: list or show.
      name: of the optimizer to show.
      names: list: one bare name a line.
    """

    action: tyro.conf.Positional[Literal["list", "show"]] = "list"
    name: tyro.conf.Positional[str] = ""
    names: tyro.conf.UseCounterAction[int] = 0  # a switch: the other booleans take a value


def run(job: ZooJob) -> None:
    """Prints the names of the optimizers, or the card of one."""
    if job.action == "show":
        console = Console()
        console.print(_card_table(job.name))
        if can_draw(console):
            console.print(_curves(zoo.card(job.name).home))
    elif job.names:
        print("\n".join(zoo.names()))
    else:
        Console().print(_names_table())
        print('use one: metaopt.load("NAME").apply(num_steps=...)')


def can_draw(console: Console) -> bool:
    """Whether the console is a terminal that shows block characters."""
    return console.is_terminal and not console.legacy_windows and console.encoding == "utf-8"


def _card_table(name: str) -> Table:
    table = Table(title=name, title_justify="left", show_header=False, box=None)
    table.add_column(style="dim", max_width=24)
    table.add_column()
    for title, text in zoo.rows(zoo.card(name)).items():
        table.add_row(title, text)
    return table


def _curves(home: zoo.Home) -> Table:
    """A line of blocks for each optimizer, their height the logarithm of the loss."""
    losses = np.array(list(home.curves.values()))
    is_shown = np.isfinite(losses) & (losses > 0)
    logs = np.log(np.where(is_shown, losses, 1.0))
    # From the lowest loss to the highest one before the first step: what diverges is at the top.
    low, high = logs[is_shown].min(), logs[:, 0].max()
    part = (logs - low) / max(high - low, 1e-9)
    heights = np.clip(part * len(BLOCKS), 0, len(BLOCKS) - 1).astype(int)
    table = Table(
        title=f"test loss on {home.task}, {home.num_steps} steps",
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for label, row, shown, height in zip(home.curves, losses, is_shown, heights, strict=True):
        blocks = "".join(BLOCKS[h] if s else " " for h, s in zip(height, shown, strict=True))
        table.add_row(label, blocks, f"{row[0]:.3g} to {row[-1]:.3g}")
    return table


def _names_table() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is for")
    for name in zoo.names():
        table.add_row(name, zoo.card(name).about)
    return table
