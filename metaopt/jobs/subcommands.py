"""Tables of settings classes as subcommands of the command line."""

import functools
import operator
from collections.abc import Mapping
from typing import Annotated, Any

import tyro


def subcommands(table: Mapping[str, type]) -> Any:
    """The union of the classes in a table, from which tyro makes one subcommand per name."""
    return functools.reduce(
        operator.or_,
        [Annotated[settings, tyro.conf.subcommand(name)] for name, settings in table.items()],
    )
