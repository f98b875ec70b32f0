"""Interactive charts of the page, drawn by Bokeh; page.js switches what they show."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.embed import json_item
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    Grid,
    HoverTool,
    Line,
    LinearAxis,
    LogAxis,
    Model,
    MultiLine,
    PrintfTickFormatter,
    Range1d,
    Scatter,
    Span,
    Step,
    VArea,
)
from bokeh.plotting import figure
from jaxtyping import Float, Int, Real

from metaopt.evaluation.records import Curves
from metaopt.evaluation.statistics import final_mean, mean_interval, min_max
from metaopt.report.looks import (
    COLOURS,
    COSTS,
    MANY_LAYERS,
    Look,
    layer_colours,
    loss_bounds,
    meta_loss_bounds,
    shades,
    visible_part,
)
from metaopt.report.summary import REFERENCE, Mixture, TaskData, mixtures
from metaopt.report.tables import point_text

# Field of `Curves` -> label of its axis.
METRICS = {"loss": "test loss", "train_loss": "training loss", "accuracy": "test accuracy"}
BOKEH_DASHES = {"-": "solid", "--": "dashed", "-.": "dashdot", ":": "dotted"}
POINTS = 200  # per curve on the page; longer curves are thinned
INK = "#000000"  # drawn in the page's text colour, which is white in dark mode


class LegendEntry(NamedTuple):
    """An entry of a legend.

    Attributes:
      name: what the entry stands for.
      colour: as ``#RRGGBB``.
      dash: as in matplotlib; "o" for dots.
    """

    name: str
    colour: str
    dash: str


class Chart(NamedTuple):
    """A chart of the page.

    Attributes:
      title: title above the chart.
      height: height in pixels.
      item: the chart as Bokeh's JSON.
      legend: entries of its legend; the lines, bands and crosses of entry i are tagged
        ``[part, i]``.
      ranges: ``{"x" | "y": {field: {"log" | "linear": [start, end]}}}``, the ranges of the fields
        that a reader can choose; empty if there is no choice.
    """

    title: str
    height: int
    item: dict[str, Any]
    legend: list[LegendEntry]
    ranges: dict[str, dict[str, dict[str, list[float]]]]


# The chart of a task


def curves_chart(task: TaskData, looks: Mapping[str, Look]) -> Chart:
    """All optimizers on one task, and below them the share of seeds whose guard switched."""
    legend = [LegendEntry(name, *looks[name]) for name in task.curves]
    metrics = [
        metric
        for metric in METRICS
        if any(_is_measured(curves, metric) for curves in task.curves.values())
    ]
    ranges = {
        "x": _cost_ranges(task),
        "y": {metric: _metric_range(task, metric) for metric in metrics},
    }
    kind = "log" if "log" in ranges["y"]["loss"] else "linear"
    x_range, y_range = ranges["x"]["steps"]["linear"], ranges["y"]["loss"][kind]
    plot = _new_plot(x_range, y_range, height=360, tools="box_zoom,reset,save")
    _add_switchable_axes(plot, x="linear", y=kind)
    lines = []
    for i, (entry, curves) in enumerate(zip(legend, task.curves.values(), strict=True)):
        source, exit_source = _curve_sources(curves, metrics)
        colour, dash = entry.colour, BOKEH_DASHES[entry.dash]
        band = VArea(
            x="steps", y1="loss_ci_low", y2="loss_ci_high", fill_color=colour, fill_alpha=0.15
        )
        line = Line(x="steps", y="loss", line_color=colour, line_width=2, line_dash=dash)
        cross = Scatter(x="steps", y="loss", marker="x", size=11, line_color=colour, line_width=3)
        plot.add_glyph(source, band, tags=["band", i], name=entry.name)
        lines.append(plot.add_glyph(source, line, tags=["line", i], name=entry.name))
        plot.add_glyph(exit_source, cross, tags=["cross", i], name=entry.name)
    if REFERENCE in task.curves:
        target = float(final_mean(task.curves[REFERENCE].loss).mean())
        if np.isfinite(target):
            span = Span(location=target, line_dash="dotted", line_color="grey", tags=["target"])
            plot.add_layout(span)
    plot.add_tools(_curves_hover(lines, metrics))
    switching = _switching_plot(task, legend, plot.x_range)
    plots = [plot, switching] if switching else [plot]
    return Chart(
        title="",
        height=sum(one.height for one in plots),
        item=_json_item(column(*plots, sizing_mode="stretch_width")),
        legend=legend,
        ranges=ranges,
    )


def _is_measured(curves: Curves, metric: str) -> bool:
    return metric == "loss" or not bool(np.isnan(getattr(curves, metric)).all())


def _add_switchable_axes(plot: Any, *, x: str, y: str) -> None:
    """Replaces the axes by a linear and a logarithmic one each, of which one is visible.

    The page shows the other one, found by its tags, and sets the scale.
    """
    for old in (*plot.xaxis, *plot.yaxis, *plot.xgrid, *plot.ygrid):
        for place in (plot.below, plot.left, plot.center):
            if old in place:
                place.remove(old)
    for dimension, name, place, visible_kind in ((0, "x", "below", x), (1, "y", "left", y)):
        for kind, axis in (("linear", LinearAxis()), ("log", _log_axis())):
            tags = ["axis", name, kind]
            axis.update(visible=kind == visible_kind, tags=tags)
            plot.add_layout(axis, place)
            across: Any = dimension  # Bokeh's type stubs do not accept an int
            plot.add_layout(
                Grid(dimension=across, axis=axis, visible=kind == visible_kind, tags=tags)
            )


def _curve_sources(
    curves: Curves, metrics: Sequence[str]
) -> tuple[ColumnDataSource, ColumnDataSource]:
    """Columns of a curve with its bands, and of the crosses where it leaves the chart."""
    keep = _thinned(len(curves.steps))
    data = {cost: _compact(getattr(curves, cost)[keep]) for cost in COSTS}
    cross = {cost: np.full(1, np.nan) for cost in COSTS}
    for metric in metrics:
        values = getattr(curves, metric)[:, keep]
        interval, extent = mean_interval(values), min_max(values)
        mean, exit_index = interval.mean, None
        if metric != "accuracy":
            mean, exit_index = visible_part(interval.mean)
        data[metric] = _compact(mean)
        for band, ends in (("ci", interval), ("range", extent)):
            for side, end in (("low", ends.low), ("high", ends.high)):
                data[f"{metric}_{band}_{side}"] = _compact(np.where(np.isnan(mean), np.nan, end))
        if exit_index is None:
            cross[metric] = np.full(1, np.nan)
        else:
            cross[metric] = np.full(1, mean[exit_index])
            cross |= {cost: data[cost][exit_index : exit_index + 1] for cost in COSTS}
    return ColumnDataSource(data), ColumnDataSource(cross)


def _switching_plot(task: TaskData, legend: Sequence[LegendEntry], x_range: Range1d) -> Any | None:
    """Share of seeds whose guard kept the learned optimizer's window, against the cost."""
    guarded = [(i, c) for i, c in enumerate(task.curves.values()) if "accepted" in c.state]
    if not guarded:
        return None
    plot = _new_plot(x_range, [-0.05, 1.05], height=150)
    _add_switchable_axes(plot, x="linear", y="linear")
    plot.yaxis.axis_label = "share kept"
    plot.yaxis[0].ticker = FixedTicker(ticks=[0, 0.5, 1])
    for i, curves in guarded:
        share = np.asarray(np.mean(curves.state["accepted"], axis=0, dtype=np.float64))
        keep = _thinned(len(share))
        data = {"share": _compact(share[keep])}
        for cost in COSTS:
            at_windows = np.interp(curves.windows, curves.steps, getattr(curves, cost))
            data[cost] = _compact(at_windows[keep])
        line = Step(
            x="steps",
            y="share",
            mode="before",
            line_color=legend[i].colour,
            line_width=2,
            line_dash=BOKEH_DASHES[legend[i].dash],
        )
        plot.add_glyph(ColumnDataSource(data), line, tags=["share", i], name=legend[i].name)
    tooltips = [("", "$name"), ("share", "@share{0%}")]
    plot.add_tools(HoverTool(tooltips=tooltips, line_policy="nearest"))
    return plot


def _curves_hover(lines: Sequence[Any], metrics: Sequence[str]) -> HoverTool:
    """Shows name, costs and metrics of the nearest point of a curve."""
    tooltips = [("", "$name")]
    tooltips += [(label, f"@{cost}{{%.5g}}") for cost, label in COSTS.items()]
    formatters: Any = {f"@{cost}": "printf" for cost in COSTS}
    for metric in metrics:
        field = lambda suffix, metric=metric: f"@{metric}{suffix}{{%.4g}}"
        tooltips.append((METRICS[metric], field("")))
        if metric == "loss":
            tooltips.append(("95% CI", f"{field('_ci_low')} – {field('_ci_high')}"))
            tooltips.append(("min – max", f"{field('_range_low')} – {field('_range_high')}"))
        for suffix in ("", "_ci_low", "_ci_high", "_range_low", "_range_high"):
            formatters[f"@{metric}{suffix}"] = "printf"
    return HoverTool(
        tooltips=tooltips, formatters=formatters, renderers=list(lines), line_policy="nearest"
    )


def _cost_ranges(task: TaskData) -> dict[str, dict[str, list[float]]]:
    ranges = {}
    for cost in COSTS:
        costs = [np.asarray(getattr(c, cost), np.float64) for c in task.curves.values()]
        end = max(float(values[-1]) for values in costs) or 1.0
        first = [values[values > 0].min() for values in costs if (values > 0).any()]
        ranges[cost] = {
            "linear": [0.0, 1.02 * end],
            "log": [0.8 * min(first, default=end / 10), 1.1 * end],
        }
    return ranges


def _metric_range(task: TaskData, metric: str) -> dict[str, list[float]]:
    """Ranges of the axis of a metric, with "log" only if the axis can be logarithmic."""
    means = [np.asarray(getattr(c, metric), np.float64).mean(axis=0) for c in task.curves.values()]
    if metric == "accuracy":
        values = np.concatenate(means)
        low = float(np.min(values, where=np.isfinite(values), initial=1.0))
        return {"linear": [low - 0.03, 1.02]}
    low, high, logarithmic = loss_bounds(means)
    if not logarithmic:
        return {"linear": [low, high]}
    return {"linear": [0.0, high], "log": [low, high]}


# The folded charts


def mixture_charts(task: TaskData) -> list[tuple[str, list[Chart]]]:
    """Per L3RS its name, and the charts of its step norm and of the weight of each base."""
    return [(mixture.optimizer, _mixture_charts(mixture)) for mixture in mixtures(task)]


def _mixture_charts(mixture: Mixture) -> list[Chart]:
    # A norm may explode with its run; a weight is between 0 and 1.
    low, high, logarithmic = loss_bounds(mixture.norms.T)
    norm_chart = _layers_chart(
        title="step norm λ",
        mixture=mixture,
        values=mixture.norms,
        y_range=[low, high],
        logarithmic=logarithmic,
    )
    weight_charts = [
        _layers_chart(
            title=f"weight α of {base}",
            mixture=mixture,
            values=mixture.weights[:, :, p],
            y_range=[-0.03, 1.03],
        )
        for p, base in enumerate(mixture.bases)
    ]
    return [norm_chart, *weight_charts]


def _layers_chart(
    *,
    title: str,
    mixture: Mixture,
    values: Float[np.ndarray, "W L"],
    y_range: Sequence[float],
    logarithmic: bool = False,
) -> Chart:
    """One line per layer, without a legend if there are many layers."""
    layers, steps = mixture.layers, mixture.steps
    colours = layer_colours(len(layers))
    points = max(20, POINTS * MANY_LAYERS // max(len(layers), 1))
    keep = _thinned(len(steps), min(POINTS, points))
    plot = _new_plot([0, float(steps[-1])], y_range, height=240, logarithmic=logarithmic)
    plot.xaxis.axis_label = "optimizer steps"
    curves = values[keep].T
    if len(layers) <= MANY_LAYERS:  # one renderer each, which the legend can hide
        for i, layer in enumerate(layers):
            line = _add_lines(plot, steps[keep], curves[i : i + 1], [layer], colours[i : i + 1])
            line.tags = ["line", i]
    else:
        _add_lines(plot, steps[keep], curves, layers, colours)
    _add_hover(plot)
    return Chart(
        title=title,
        height=plot.height,
        item=_json_item(plot),
        legend=[LegendEntry(*entry, "-") for entry in zip(layers, colours, strict=True)],
        ranges={},
    )


def tuning_chart(task: TaskData, name: str) -> Chart:
    """Curves of a baseline's grid, mean over tuning seeds; the chosen point is bold."""
    grid, tuned = task.grids[name], task.record.tuned[name]
    means = np.asarray(grid.loss, np.float64).mean(axis=1)
    low, high, logarithmic = loss_bounds(means)
    plot = _new_plot([0, float(grid.steps[-1])], [low, high], height=260, logarithmic=logarithmic)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "optimizer steps", "validation loss"
    keep = _thinned(len(grid.steps))
    _add_lines(
        plot,
        grid.steps[keep],
        [visible_part(mean)[0][keep] for mean in means],
        names=[point_text(point) for point in tuned["grid"]],
        colours=shades(len(means)),
        widths=[4.0 if point == tuned["point"] else 1.5 for point in tuned["grid"]],
    )
    _add_hover(plot)
    return Chart(title="", height=plot.height, item=_json_item(plot), legend=[], ranges={})


def training_chart(name: str, metrics: Mapping[str, np.ndarray]) -> Chart:
    """Meta-loss per meta-update; dots show the loss on held-out runs."""
    legend = [LegendEntry("meta-loss", COLOURS[2], "-")]
    low, high, logarithmic = meta_loss_bounds(metrics)
    x_range = [0, float(metrics["step"][-1])]
    plot = _new_plot(x_range, [low, high], height=260, logarithmic=logarithmic)
    plot.xaxis.axis_label, plot.yaxis.axis_label = "meta-updates", "objective of the inner run"
    keep = _thinned(len(metrics["step"]), 4 * POINTS)
    line = _add_lines(
        plot,
        metrics["step"][keep],
        [metrics["meta_loss"][keep]],
        names=[legend[0].name],
        colours=[legend[0].colour],
        widths=[1.0],  # thin, so that the dots are visible
    )
    line.tags = ["line", 0]
    if "validation_loss" in metrics:
        name_of_dots, colour = "held-out loss", COLOURS[4]
        legend.append(LegendEntry(name_of_dots, colour, "o"))
        measured = np.isfinite(metrics["validation_loss"])
        data: dict[str, Any] = {f: metrics[f][measured] for f in ("step", "validation_loss")}
        data["name"] = [name_of_dots] * int(measured.sum())
        dots = Scatter(x="step", y="validation_loss", size=6, fill_color=colour, line_color=colour)
        plot.add_glyph(ColumnDataSource(data), dots).tags = ["dots", 1]
    _add_hover(plot)
    return Chart(title=name, height=plot.height, item=_json_item(plot), legend=legend, ranges={})


# Parts of charts


def _new_plot(
    x_range: Sequence[float] | Range1d,
    y_range: Sequence[float],
    *,
    height: int,
    logarithmic: bool = False,
    tools: str = "",
) -> Any:
    """An empty plot as wide as the page.

    Args:
      x_range: start and end of the x axis, or the range of another plot that it follows.
      y_range: start and end of the y axis.
      height: height in pixels.
      logarithmic: whether the y axis is logarithmic.
      tools: names of Bokeh's tools, separated by commas.
    """
    plot: Any = figure(
        height=height,
        sizing_mode="stretch_width",
        x_range=x_range if isinstance(x_range, Range1d) else _range(x_range),
        y_range=_range(y_range),
        y_axis_type="log" if logarithmic else "linear",
        tools=tools,
        active_drag=None,
        min_border_left=56,
        min_border_bottom=8,
        min_border_right=12,
        toolbar_location="above" if tools else None,
    )
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    if logarithmic:
        for axis in plot.yaxis:
            axis.ticker, axis.formatter = _log_axis().ticker, _log_axis().formatter
        for grid in plot.ygrid:
            grid.ticker = plot.yaxis[0].ticker
    return plot


def _range(ends: Sequence[float]) -> Range1d:
    start, end = ends
    return Range1d(start=start, end=end)


def _log_axis() -> Any:
    """A logarithmic axis whose ticks page.js sets.

    Bokeh's own ticks leave the lower half of two decades without a label.
    """
    axis: Any = LogAxis()  # Bokeh's type stubs accept no other tickers
    axis.ticker, axis.formatter = FixedTicker(ticks=[]), PrintfTickFormatter(format="%.3g")
    return axis


def _add_lines(
    plot: Any,
    x: Real[np.ndarray, " M"],
    lines: Iterable[np.ndarray],
    names: Sequence[str],
    colours: Sequence[str],
    widths: Sequence[float] = (),
) -> Any:
    """Adds lines over the same x as a single renderer, which stays fast with hundreds of them."""
    columns = {
        "xs": [_compact(x)] * len(names),
        "ys": [_compact(line) for line in lines],
        "name": list(names),
        "colour": list(colours),
        "width": list(widths or [2.0] * len(names)),
    }
    glyph = MultiLine(xs="xs", ys="ys", line_color="colour", line_width="width")
    return plot.add_glyph(ColumnDataSource(columns), glyph)


def _add_hover(plot: Any) -> None:
    tooltips = [("", "@name"), ("step", "$snap_x{0,0}"), ("value", "$snap_y{%.4g}")]
    formatters: Any = {"$snap_y": "printf"}
    plot.add_tools(HoverTool(tooltips=tooltips, formatters=formatters, line_policy="nearest"))


def _thinned(number: int, points: int = POINTS) -> Int[np.ndarray, " points"]:
    """Indices of at most `points` out of `number` points; both ends are among them."""
    return np.unique(np.linspace(0, number - 1, min(number, points)).round().astype(int))


def _compact(values: Real[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The values as float32, which takes half the bytes; inf and huge values become NaN."""
    values = np.asarray(values, np.float64)
    return np.where(np.abs(values) < 1e30, values, np.nan).astype(np.float32)


def _json_item(model: Model) -> dict[str, Any]:
    """The JSON that the page embeds."""
    return dict(json_item(model))
