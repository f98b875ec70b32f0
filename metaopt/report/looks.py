"""What figures and the page share: colours, dashes, labels and bounds of axes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, Real
from matplotlib.colors import to_hex

from metaopt.evaluation.records import CurveRecord

# The palette of Okabe and Ito, which colour-blind readers and grey prints can tell apart.
COLOURS = ("#8C8C8C", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
MOST_PANELS = 60  # of a figure; more would make a picture that no program opens
MANY_LAYERS = 8  # more layers are coloured by depth, without a legend
OFF_CHART = 1e3  # a mean above this multiple of its start is not drawn

# Field of `Curves` -> label of its axis.
COSTS = {
    "steps": "optimizer steps",
    "grad_evals": "gradient evaluations",
    "seconds": "seconds",
}


class Look(NamedTuple):
    """How an optimizer is drawn, in every panel alike.

    Attributes:
      colour: as ``#RRGGBB``.
      dash: one of `DASHES`.
    """

    colour: str
    dash: str


class Bounds(NamedTuple):
    """Bounds of an axis.

    Attributes:
      low: lower end.
      high: upper end.
      logarithmic: whether the axis is logarithmic.
    """

    low: float
    high: float
    logarithmic: bool


def choose_looks(
    entries: Mapping[str, CurveRecord], panels: Sequence[Collection[str]] = ()
) -> dict[str, Look]:
    """A look for each optimizer; those that share a panel differ, up to 32 of them.

    A guarded optimizer has the colour of its learned optimizer and a dash for its guard. If only
    one learned optimizer is guarded and enough colours are free, it has a colour for its guard and
    a dash for its fallback instead.

    Args:
      entries: all optimizers, by name.
      panels: names of the optimizers in each panel; by default one panel shows all.
    """
    guarded = {name: entry for name, entry in entries.items() if entry.kind == "guarded"}
    guards = list(dict.fromkeys(entry.guard for entry in guarded.values()))
    fallbacks = list(dict.fromkeys(entry.fallback for entry in guarded.values()))
    all_looks = [Look(colour, dash) for dash in DASHES for colour in COLOURS]
    looks: dict[str, Look] = {}

    def assign(name: str, preferred: Sequence[Look]) -> None:
        neighbours = {other for panel in panels or [entries] if name in panel for other in panel}
        taken = {look for other, look in looks.items() if other in neighbours}
        free = [look for look in (*preferred, *all_looks) if look not in taken]
        looks[name] = free[0] if free else all_looks[len(looks) % len(all_looks)]

    for name in entries:
        if name not in guarded:
            assign(name, ())
    used = {look.colour for look in looks.values()}
    unused = [colour for colour in COLOURS if colour not in used]
    one_learned = len({entry.learned for entry in guarded.values()}) == 1
    colour_by_guard = one_learned and len(unused) >= len(guards)
    for name, entry in guarded.items():
        if colour_by_guard:
            colour, index = unused[guards.index(entry.guard)], fallbacks.index(entry.fallback)
        else:
            colour = looks[entry.learned].colour if entry.learned in looks else COLOURS[-1]
            index = guards.index(entry.guard)
        first = 1 + index % (len(DASHES) - 1)
        assign(name, [Look(colour, dash) for dash in (*DASHES[first:], *DASHES[:first])])
    return {name: looks[name] for name in entries}


def shades(number: int) -> list[str]:
    """Colours from dark to bright, all visible on white and on black."""
    colour_map = matplotlib.colormaps["viridis"]
    return [to_hex(shade) for shade in colour_map(np.linspace(0.2, 0.9, number))]


def layer_colours(number: int) -> list[str]:
    """A colour per layer; with more than `MANY_LAYERS` layers, by depth from dark to bright."""
    return list(COLOURS[:number]) if number <= MANY_LAYERS else shades(number)


def visible_part(mean: Real[np.ndarray, " M"]) -> tuple[Float[np.ndarray, " M"], int | None]:
    """The part of a mean curve that is drawn, and where the curve left the chart for good.

    Returns:
      The curve, with NaN where it is not finite or above `OFF_CHART` times its start; and the
      index of its last visible point, which is marked by a cross, or None if the end is visible.
    """
    mean = np.asarray(mean, np.float64)
    finite = np.isfinite(mean)
    start = mean[0] if finite[0] and mean[0] > 0 else 1.0
    visible = finite & (np.where(finite, mean, 0.0) <= OFF_CHART * start)
    curve = np.where(visible, mean, np.nan)
    if visible[-1] or not visible.any():
        return curve, None
    return curve, int(np.flatnonzero(visible)[-1])


def loss_bounds(means: Iterable[np.ndarray]) -> Bounds:
    """Bounds of the loss axis of mean curves; runs that diverged do not compress the others.

    The axis is linear if a mean is negative or none is positive, otherwise logarithmic.
    """
    curves = [visible_part(mean)[0] for mean in means]
    values = np.concatenate([curve[~np.isnan(curve)] for curve in curves] or [np.ones(1)])
    starts = [curve[0] for curve in curves if not np.isnan(curve[0])]
    top = min(values.max(initial=-np.inf), 10.0 * max(starts, default=np.inf))
    if not values.size:
        return Bounds(0.1, 1.0, logarithmic=True)
    if values.min() < 0 or top <= 0:
        margin = 0.05 * max(values.max() - values.min(), 1e-12)
        low, high = float(values.min() - margin), float(values.max() + margin)
        return Bounds(low, high, logarithmic=False)
    lowest = max(values[values > 0].min(), 1e-12 * top)
    return Bounds(float(0.6 * lowest), float(1.5 * top), logarithmic=True)


def meta_loss_bounds(metrics: Mapping[str, np.ndarray]) -> Bounds:
    """`loss_bounds` of a meta-training, whose loss may explode in single updates and recover.

    All held-out losses are visible. The meta-loss is visible up to three times its first value, or
    up to thirty times its median if the first value is itself an explosion.
    """
    meta_loss = metrics["meta_loss"]
    held_out = metrics.get("validation_loss", np.ones(0))
    meta_loss, held_out = meta_loss[np.isfinite(meta_loss)], held_out[np.isfinite(held_out)]
    if not meta_loss.size:
        return Bounds(0.1, 1.0, logarithmic=True)
    median = np.median(np.abs(meta_loss))
    top = max(30.0 * median, min(3.0 * np.abs(meta_loss[0]), 1000.0 * median))
    visible = np.minimum(meta_loss, max(top, held_out.max(initial=0.0)))
    return loss_bounds([visible, held_out] if held_out.size else [visible])
