"""What tells optimizers apart in pictures: a colour and a dash, the same in every panel."""

from collections.abc import Collection, Mapping, Sequence

from metaopt.evaluation.records import CurveRecord
from metaopt.report.plots import COLOURS, DASHES

Look = tuple[str, str]  # colour, dash


def looks_of(
    entries: Mapping[str, CurveRecord], panels: Sequence[Collection[str]] = ()
) -> dict[str, Look]:
    """(colour, dash) per optimizer; no two alike (up to 32) that share a panel.

    A guarded optimizer has the colour of its learned one and a dash of its guard. Where only one is
    guarded, a colour of the guard and a dash of the fallback tell more, if there are enough.

    Args:
      entries: all optimizers, by name.
      panels: names that are drawn in one panel, panel by panel; none: all in one.
    """
    guarded = {name: entry for name, entry in entries.items() if entry.kind == "guarded"}
    guards = list(dict.fromkeys(entry.guard for entry in guarded.values()))
    fallbacks = list(dict.fromkeys(entry.fallback for entry in guarded.values()))
    free = [(colour, dash) for dash in DASHES for colour in COLOURS]
    looks: dict[str, Look] = {}

    def take(name: str, wanted: Sequence[Look]) -> None:
        beside = {other for panel in panels or [entries] if name in panel for other in panel}
        taken = {look for other, look in looks.items() if other in beside}
        left = [look for look in (*wanted, *free) if look not in taken]
        looks[name] = left[0] if left else free[len(looks) % len(free)]

    for name in entries:
        if name not in guarded:
            take(name, ())
    unused = [colour for colour in COLOURS if colour not in {look[0] for look in looks.values()}]
    one = len({entry.learned for entry in guarded.values()}) == 1 and len(unused) >= len(guards)
    for name, entry in guarded.items():
        colour = looks[entry.learned][0] if entry.learned in looks else COLOURS[-1]
        index = guards.index(entry.guard)
        if one:
            colour, index = unused[index], fallbacks.index(entry.fallback)
        first = 1 + index % (len(DASHES) - 1)
        take(name, [(colour, dash) for dash in (*DASHES[first:], *DASHES[:first])])
    return {name: looks[name] for name in entries}
