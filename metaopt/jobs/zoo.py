"""`metaopt zoo`: the trained optimizers that ship with the package."""

from dataclasses import dataclass
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from metaopt import zoo


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
        Console().print(_card_table(job.name))
    elif job.names:
        print("\n".join(zoo.names()))
    else:
        Console().print(_names_table())
        print('use one: metaopt.load("NAME").apply(num_steps=...)')


def _card_table(name: str) -> Table:
    table = Table(title=name, title_justify="left", show_header=False, box=None)
    table.add_column(style="dim", max_width=24)
    table.add_column()
    for title, text in zoo.rows(zoo.card(name)).items():
        table.add_row(title, text)
    return table


def _names_table() -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is for")
    for name in zoo.names():
        table.add_row(name, zoo.card(name).about)
    return table
