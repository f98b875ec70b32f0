"""Names that people type, checked against a table."""

import difflib
from collections.abc import Iterable


def known(kind: str, name: str, table: Iterable[str]) -> None:
    """Raises `ValueError` with the near matches unless `name` is in `table`."""
    table = list(table)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(table)}."
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
