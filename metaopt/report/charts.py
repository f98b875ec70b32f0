"""Interactive charts of the page. A script on the page (page.js) switches what they show."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LogAxis,
    Model,
    MultiLine,
    PrintfTickFormatter,
    Range1d,
    Scatter,
)
from bokeh.plotting import figure

from metaopt.report import plots
from metaopt.report.figures import base_names, layer_names
from metaopt.report.summary import TaskData
from metaopt.report.tables import point_text

DASHES = {"-": "solid", "--": "dashed", "-.": "dashdot", ":": "dotted"}
POINTS = 200  # of a curve on the page; a longer one is thinned
INK = "#000000"  # drawn in the page's text colour: white in dark mode


class Key(NamedTuple):
    """An entry of a legend. Attributes: name, colour; dash: as in matplotlib."""

    name: str
    colour: str
    dash: str


class Chart(NamedTuple):
    """A chart of the page.

    Attributes:
      title: above it.
      height: in pixels.
      item: Bokeh's JSON.
      keys: its legend; a line, band or cross of entry i is tagged ``[part, i]``.
      ranges: ``{"x" | "y": {field: {"log" | "linear": [start, end]}}}`` of what can be chosen;
        empty where nothing can.
    """

    title: str
    height: int
    item: dict[str, Any]
    keys: list[Key]
    ranges: dict[str, dict[str, dict[str, list[float]]]]


def mixture_charts(task: TaskData) -> list[tuple[str, list[Chart]]]:
    """(optimizer, charts of lambda and of each base's alpha, mean over seeds) per L3RS."""
    made = []
    for name, curves in task.curves.items():
        if not {"alpha", "lambda_"} <= set(curves.state):
            continue
        entry = task.record.curves[name]
        layers = layer_names(curves, entry.layers)
        norms = np.mean(curves.state["lambda_"], axis=0)
        weights = np.mean(curves.state["alpha"], axis=0)
        lines = _trajectories(curves.windows, norms, layers, logarithmic=True)
        charts = [lines._replace(title="step norm λ")]
        for p, base in enumerate(base_names(curves, entry.bases)):
            chart = _trajectories(curves.windows, weights[:, :, p], layers, logarithmic=False)
            charts.append(chart._replace(title=f"weight α of {base}"))
        made.append((name, charts))
    return made


def tuning_chart(task: TaskData, name: str) -> Chart:
    """The curves of a baseline's grid, mean over tuning seeds; the chosen point is bold."""
    grid, tuned = task.grids[name], task.record.tuned[name]
    means = np.asarray(grid.loss, np.float64).mean(axis=1)
    low, high, logarithmic = plots.loss_bounds(means)
    x_range = new_range(0, float(grid.steps[-1]))
    plot = new_figure(x_range, new_range(low, high), 260, logarithmic=logarithmic)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer steps", "validation loss"
    shades = plots.shades(len(means))
    keep = thinned(len(grid.steps))
    names = [point_text(point) for point in tuned["grid"]]
    widths = [4.0 if point == tuned["point"] else 1.5 for point in tuned["grid"]]
    drawn = [plots.on_chart(mean)[0][keep] for mean in means]
    _add_lines(plot, grid.steps[keep], drawn, names, shades, widths)
    _add_hover(plot)
    return Chart("", plot.height, item_of(plot), [], {})


def training_chart(name: str, metrics: Mapping[str, np.ndarray]) -> Chart:
    """Meta-loss per meta-update; dots: the loss on held-out runs."""
    keys = [Key("meta-loss", plots.COLOURS[2], "-")]
    low, high, logarithmic = plots.meta_bounds(metrics)
    x_range = new_range(0, float(metrics["step"][-1]))
    plot = new_figure(x_range, new_range(low, high), 260, logarithmic=logarithmic)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "meta-updates", "loss of the inner run"
    keep = thinned(len(metrics["step"]), 4 * POINTS)
    meta_loss = metrics["meta_loss"][keep]
    look = ([keys[0].name], [keys[0].colour], [1.0])  # thin, so that the dots are seen
    line = _add_lines(plot, metrics["step"][keep], [meta_loss], *look)
    line.tags = ["line", 0]
    if "validation_loss" in metrics:
        keys.append(Key("held out", plots.COLOURS[4], "o"))
        there = np.isfinite(metrics["validation_loss"])
        data: dict[str, Any] = {f: metrics[f][there] for f in ("step", "validation_loss")}
        data["name"] = [keys[1].name] * int(there.sum())
        colour = keys[1].colour
        dots = Scatter(x="step", y="validation_loss", size=6, fill_color=colour, line_color=colour)
        plot.add_glyph(ColumnDataSource(data), dots).tags = ["dots", 1]
    _add_hover(plot)
    return Chart(name, plot.height, item_of(plot), keys, {})


def new_range(start: float, end: float) -> Range1d:
    """Ends of an axis."""
    return Range1d(start=start, end=end)


def log_axis() -> Any:
    """Its ticks are set by page.js: Bokeh's own leave the lower half of two decades bare."""
    axis: Any = LogAxis()  # its type stubs know of no other tickers
    axis.ticker, axis.formatter = FixedTicker(ticks=[]), PrintfTickFormatter(format="%.3g")
    return axis


def new_figure(
    x_range: Range1d, y_range: Range1d, height: int, *, logarithmic: bool = False, tools: str = ""
) -> Any:
    """An empty plot as wide as its place; `logarithmic`: its y axis; `tools`: names of Bokeh's."""
    plot: Any = figure(
        height=height, sizing_mode="stretch_width", x_range=x_range, y_range=y_range,
        y_axis_type="log" if logarithmic else "linear", tools=tools, active_drag=None,
        min_border_left=56, min_border_bottom=8, min_border_right=12,
        toolbar_location="above" if tools else None,
    )  # fmt: skip
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    if logarithmic:
        for axis in plot.yaxis:
            axis.ticker, axis.formatter = log_axis().ticker, log_axis().formatter
        for grid in plot.ygrid:
            grid.ticker = plot.yaxis[0].ticker
    return plot


def _trajectories(
    x: np.ndarray, values: np.ndarray, layers: Sequence[str], *, logarithmic: bool
) -> Chart:
    """One line per layer of ``values [W, L]``; many layers are coloured by depth."""
    colours = plots.layer_colours(len(layers))
    budget = max(20, POINTS * plots.MANY_LAYERS // max(len(layers), 1))
    keep = thinned(len(x), min(POINTS, budget))
    low, high = -0.03, 1.03
    if logarithmic:  # a step norm may explode with its run
        low, high, logarithmic = plots.loss_bounds(values.T)
    plot = new_figure(
        new_range(0, float(x[-1])), new_range(low, high), 240, logarithmic=logarithmic
    )
    plot.xaxis.axis_label = "optimizer steps"
    drawn = values[keep].T
    if len(layers) <= plots.MANY_LAYERS:  # one by one, for the legend
        for i, layer in enumerate(layers):
            line = _add_lines(plot, x[keep], drawn[i : i + 1], [layer], colours[i : i + 1])
            line.tags = ["line", i]
    else:
        _add_lines(plot, x[keep], drawn, layers, colours)
    _add_hover(plot)
    keys = [Key(layer, colour, "-") for layer, colour in zip(layers, colours, strict=True)]
    return Chart("", plot.height, item_of(plot), keys, {})


def _add_lines(
    plot: Any,
    x: np.ndarray,
    lines: Iterable[np.ndarray],
    names: Sequence[str],
    colours: Sequence[str],
    widths: Sequence[float] = (),
) -> Any:
    """Lines over the same x as a single renderer: hundreds of them stay light."""
    columns = {
        "xs": [small(x)] * len(names),
        "ys": [small(line) for line in lines],
        "name": list(names),
        "colour": list(colours),
        "width": list(widths or [2.0] * len(names)),
    }
    glyph = MultiLine(xs="xs", ys="ys", line_color="colour", line_width="width")
    return plot.add_glyph(ColumnDataSource(columns), glyph)


def _add_hover(plot: Any) -> None:
    rows = [("", "@name"), ("step", "$snap_x{0,0}"), ("value", "$snap_y{%.4g}")]
    formats: Any = {"$snap_y": "printf"}
    plot.add_tools(HoverTool(tooltips=rows, formatters=formats, line_policy="nearest"))


def thinned(number: int, points: int = POINTS) -> np.ndarray:
    """Indices of at most `points` of `number` points, both ends among them."""
    return np.unique(np.linspace(0, number - 1, min(number, points)).round().astype(int))


def small(values: np.ndarray) -> np.ndarray:
    """Half the bytes; what no axis shows (inf, and what float32 cannot hold) is NaN."""
    values = np.asarray(values, np.float64)
    return np.where(np.abs(values) < 1e30, values, np.nan).astype(np.float32)


def item_of(model: Model) -> dict[str, Any]:
    """What the page embeds."""
    return dict(json_item(model))
