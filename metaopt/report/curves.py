"""The chart of a task: all its curves, and below them where the guards switch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.layouts import column
from bokeh.models import (
    ColumnDataSource,
    FixedTicker,
    Grid,
    HoverTool,
    Line,
    LinearAxis,
    Scatter,
    Span,
    Step,
    VArea,
)

from metaopt.evaluation.records import Curves
from metaopt.evaluation.statistics import final_mean, mean_interval, min_max
from metaopt.report import plots
from metaopt.report.charts import (
    DASHES,
    Chart,
    Key,
    item_of,
    log_axis,
    new_figure,
    new_range,
    small,
    thinned,
)
from metaopt.report.figures import COSTS
from metaopt.report.summary import REFERENCE, TaskData

METRICS = {"loss": "test loss", "train_loss": "training loss", "accuracy": "test accuracy"}


def curves_chart(task: TaskData, looks: Mapping[str, tuple[str, str]]) -> Chart:
    """All optimizers on one task, and below it the share of seeds on which a guard switched."""
    keys = [Key(name, *looks[name]) for name in task.curves]
    metrics = [m for m in METRICS if any(_measured(c, m) for c in task.curves.values())]
    ranges = {"x": _cost_ranges(task), "y": {m: _metric_range(task, m) for m in metrics}}
    start, end = ranges["x"]["steps"]["linear"]
    kind = "log" if "log" in ranges["y"]["loss"] else "linear"
    y_range = new_range(*ranges["y"]["loss"][kind])
    plot = new_figure(new_range(start, end), y_range, 360, tools="box_zoom,reset,save")
    _switchable_axes(plot, x="linear", y=kind)
    lines = []
    for i, (key, curves) in enumerate(zip(keys, task.curves.values(), strict=True)):
        source, crosses = _curve_sources(curves, metrics)
        band = VArea(x="steps", y1="loss_ci_low", y2="loss_ci_high", fill_alpha=0.15)
        line = Line(x="steps", y="loss", line_width=2, line_dash=DASHES[key.dash])
        cross = Scatter(x="steps", y="loss", marker="x", size=11, line_width=3)
        band.fill_color, line.line_color, cross.line_color = 3 * (key.colour,)
        for part, data, glyph in (
            ("band", source, band),
            ("line", source, line),
            ("cross", crosses, cross),
        ):
            renderer = plot.add_glyph(data, glyph, tags=[part, i], name=key.name)
            if part == "line":
                lines.append(renderer)
    if REFERENCE in task.curves:
        target = float(final_mean(task.curves[REFERENCE].loss).mean())
        if np.isfinite(target):
            span = Span(location=target, line_dash="dotted", line_color="grey", tags=["target"])
            plot.add_layout(span)
    plot.add_tools(_hover(lines, metrics))
    switching = _switching(task, keys, plot.x_range)
    rows = [plot, switching] if switching else [plot]
    item = item_of(column(*rows, sizing_mode="stretch_width"))
    return Chart("", sum(row.height for row in rows), item, keys, ranges)


def _switchable_axes(plot: Any, *, x: str, y: str) -> None:
    """A linear and a logarithmic axis each, tagged; the page shows one and sets the scale."""
    for old in (*plot.xaxis, *plot.yaxis, *plot.xgrid, *plot.ygrid):
        for side in (plot.below, plot.left, plot.center):
            if old in side:
                side.remove(old)
    for dimension, place, shown in ((0, "below", x), (1, "left", y)):
        across: Any = dimension
        axes = {"linear": LinearAxis(), "log": log_axis()}
        for kind, axis in axes.items():
            tags = ["axis", "xy"[dimension], kind]
            axis.update(visible=kind == shown, tags=tags)
            plot.add_layout(axis, place)
            grid = Grid(dimension=across, axis=axis, visible=kind == shown, tags=tags)
            plot.add_layout(grid)


def _curve_sources(
    curves: Curves, metrics: Sequence[str]
) -> tuple[ColumnDataSource, ColumnDataSource]:
    """Columns of a curve with its bands, and of the crosses where it diverged."""
    keep = thinned(len(curves.steps))
    data = {cost: small(getattr(curves, cost)[keep]) for cost in COSTS}
    cross = {cost: np.full(1, np.nan) for cost in COSTS}
    for metric in metrics:
        values = getattr(curves, metric)[:, keep]
        interval, extent = mean_interval(values), min_max(values)
        drawn, left = interval.mean, None
        if metric != "accuracy":
            drawn, left = plots.on_chart(interval.mean)
        data[metric] = small(drawn)
        for band, ends in (("ci", interval), ("range", extent)):
            for side, end in (("low", ends.low), ("high", ends.high)):
                data[f"{metric}_{band}_{side}"] = small(np.where(np.isnan(drawn), np.nan, end))
        cross[metric] = np.full(1, np.nan if left is None else drawn[left])
        if left is not None:
            cross |= {cost: data[cost][left : left + 1] for cost in COSTS}
    return ColumnDataSource(data), ColumnDataSource(cross)


def _switching(task: TaskData, keys: Sequence[Key], x_range: Any) -> Any | None:
    """Share of seeds whose guard kept the learned optimizer's window, against the cost."""
    guarded = [(i, c) for i, c in enumerate(task.curves.values()) if "accepted" in c.state]
    if not guarded:
        return None
    plot = new_figure(x_range, new_range(-0.05, 1.05), 150)
    _switchable_axes(plot, x="linear", y="linear")
    plot.yaxis.axis_label = "share kept"
    plot.yaxis[0].ticker = FixedTicker(ticks=[0, 0.5, 1])
    for i, curves in guarded:
        share = np.asarray(np.mean(curves.state["accepted"], axis=0, dtype=np.float64))
        keep = thinned(len(share))
        data = {"share": small(share[keep])}
        for cost in COSTS:
            at_windows = np.interp(curves.windows, curves.steps, getattr(curves, cost))
            data[cost] = small(at_windows[keep])
        line = Step(x="steps", y="share", mode="before", line_width=2, line_color=keys[i].colour)
        line.line_dash = DASHES[keys[i].dash]
        plot.add_glyph(ColumnDataSource(data), line, tags=["share", i], name=keys[i].name)
    hover = HoverTool(tooltips=[("", "$name"), ("share", "@share{0%}")], line_policy="nearest")
    plot.add_tools(hover)
    return plot


def _hover(lines: Sequence[Any], metrics: Sequence[str]) -> HoverTool:
    rows = [("", "$name"), *((label, f"@{cost}{{%.5g}}") for cost, label in COSTS.items())]
    formats: Any = {f"@{cost}": "printf" for cost in COSTS}
    for metric in metrics:
        fields = [metric, *(f"{metric}_{b}_{s}" for b in ("ci", "range") for s in ("low", "high"))]
        mean, *ends = (f"@{field}{{%.4g}}" for field in fields)
        rows += [(METRICS[metric], mean)]
        if metric == "loss":
            rows += [("95% CI", f"{ends[0]} – {ends[1]}"), ("min – max", f"{ends[2]} – {ends[3]}")]
        formats |= {f"@{field}": "printf" for field in fields}
    return HoverTool(
        tooltips=rows, formatters=formats, renderers=list(lines), line_policy="nearest"
    )


def _cost_ranges(task: TaskData) -> dict[str, dict[str, list[float]]]:
    ranges = {}
    for cost in COSTS:
        values = [np.asarray(getattr(c, cost), np.float64) for c in task.curves.values()]
        end = max(float(v[-1]) for v in values) or 1.0
        first = [v[v > 0].min() for v in values if (v > 0).any()]
        ranges[cost] = {
            "linear": [0.0, 1.02 * end],
            "log": [0.8 * min(first, default=end / 10), 1.1 * end],
        }
    return ranges


def _metric_range(task: TaskData, metric: str) -> dict[str, list[float]]:
    """Ends of the axis, with "log" only where the metric can be drawn so."""
    means = [np.asarray(getattr(c, metric), np.float64).mean(axis=0) for c in task.curves.values()]
    if metric == "accuracy":
        values = np.concatenate(means)
        low = float(np.min(values, where=np.isfinite(values), initial=1.0))
        return {"linear": [low - 0.03, 1.02]}
    low, high, logarithmic = plots.loss_bounds(means)
    if not logarithmic:
        return {"linear": [low, high]}
    return {"linear": [0.0, high], "log": [low, high]}


def _measured(curves: Curves, metric: str) -> bool:
    return not bool(np.isnan(getattr(curves, metric)).all()) or metric == "loss"
