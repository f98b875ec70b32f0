"""The HTML page of an evaluation: one file that needs nothing but a browser."""

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bokeh.resources import Resources
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from metaopt.evaluation.statistics import Interval
from metaopt.report import tables
from metaopt.report.break_even import break_evens
from metaopt.report.charts import (
    INK,
    METRICS,
    POINTS,
    Chart,
    LegendEntry,
    curves_chart,
    mixture_charts,
    training_chart,
    tuning_chart,
)
from metaopt.report.looks import COSTS, MANY_LAYERS, Look, choose_looks
from metaopt.report.summary import (
    REFERENCE,
    Evaluation,
    Standing,
    TaskData,
    headline,
    optimizers,
    rows,
    standings,
    training_runs,
)

# Dash of a legend entry -> stroke-dasharray of its swatch.
SVG_DASHES = {"-": "none", "--": "7 4", "-.": "7 3 2 3", ":": "2 3", "o": "0 8"}


class PlacedChart(NamedTuple):
    """A chart with its place on the page.

    Attributes:
      number: number of the chart on the page.
      chart: the chart.
    """

    number: int
    chart: Chart


class TableRow(NamedTuple):
    """A row of a table on the page.

    Attributes:
      cells: texts of the cells.
      legend_entry: the entry whose swatch stands before the first cell, if any.
      reference: whether the row is that of the reference.
      bars: for each cell an SVG behind its text, or None.
    """

    cells: list[str]
    legend_entry: LegendEntry | None = None
    reference: bool = False
    bars: Sequence[Markup | None] = ()


def render(evaluation: Evaluation, folder: Path) -> str:
    """The whole page as HTML; `folder` is named on it as the place of the records."""
    looks = choose_looks(optimizers(evaluation), [task.curves for task in evaluation.tasks])
    charts: list[Chart] = []  # in the order in which the page numbers them
    ranking = standings(evaluation)
    rival = ranking[0].rival if ranking else None
    first, details = headline(evaluation, ranking)
    tasks = [_task_context(charts, task, looks) for task in evaluation.tasks]
    training = [
        _place(charts, training_chart(name, metrics))
        for name, metrics in training_runs(evaluation.index).items()
    ]
    measured = {field for chart in charts for field in chart.ranges.get("y", {})}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.filters["soften_interval"] = _soften_interval
    source = files("metaopt.report")
    context = {
        "headline": first,
        "details": details,
        "caveats": tables.caveats(evaluation),
        "standing_columns": list(tables.standing_columns(rival).values()),
        "standings": [_standing_row(s, ranking, len(tasks), looks) for s in ranking],
        "explanation": tables.EXPLANATION,
        "break_even_columns": tables.BREAK_EVEN_COLUMNS,
        "break_evens": [
            TableRow(tables.break_even_cells(entry)) for entry in break_evens(evaluation)
        ],
        "break_even_explanation": tables.BREAK_EVEN_EXPLANATION,
        "tasks": tasks,
        "training": training,
        "data": _json({"labels": COSTS | METRICS, "charts": [_chart_data(c) for c in charts]}),
        "job": {"seeds": ""} | evaluation.index["job"],
        "subject": " ".join(tables.subject(evaluation.index["job"])),
        "environment": {"command": ""} | evaluation.index.get("environment", {}),
        "costs": COSTS,
        "metrics": {field: label for field, label in METRICS.items() if field in measured},
        "reference": REFERENCE,
        "folder": folder,
        "ink": INK,
        "points": POINTS,
        "svg_dashes": SVG_DASHES,
        "many_layers": MANY_LAYERS,
        "css": Markup(source.joinpath("page.css").read_text(encoding="utf-8")),
        "script": Markup(source.joinpath("page.js").read_text(encoding="utf-8")),
        "bokeh": Markup(_bokeh_script()),
    }
    return environment.from_string(source.joinpath("page.html").read_text(encoding="utf-8")).render(
        context
    )


def _place(charts: list[Chart], chart: Chart) -> PlacedChart:
    """Appends a chart to those of the page."""
    charts.append(chart)
    return PlacedChart(len(charts) - 1, chart)


def _chart_data(chart: Chart) -> dict[str, Any]:
    """What page.js reads of a chart; `ink` lists the entries in the page's text colour."""
    ink = [i for i, entry in enumerate(chart.legend) if entry.colour == INK]
    return {"item": chart.item, "ranges": chart.ranges, "ink": ink}


def _task_context(charts: list[Chart], task: TaskData, looks: dict[str, Look]) -> dict[str, Any]:
    """What the template shows of a task; its charts are appended to `charts`."""
    table = rows(task)
    columns = tables.row_columns(table)
    return {
        "folder": task.folder,
        "record": task.record,
        "every": max(int(np.diff(curves.steps).max()) for curves in task.curves.values()),
        "target": REFERENCE in task.curves,
        "switching": any("accepted" in curves.state for curves in task.curves.values()),
        "curves": _place(charts, curves_chart(task, looks)),
        "columns": columns,
        "rows": [
            TableRow(
                cells=tables.row_cells(row, columns),
                legend_entry=LegendEntry(row.optimizer, *looks[row.optimizer]),
                reference=row.optimizer == REFERENCE,
            )
            for row in table
        ],
        "mixtures": [
            (name, [_place(charts, chart) for chart in panels])
            for name, panels in mixture_charts(task)
        ],
        "grids": [_grid_context(charts, task, name) for name in task.record.tuned],
    }


def _grid_context(charts: list[Chart], task: TaskData, name: str) -> dict[str, Any]:
    """What the template shows of a baseline's grid search, the best point first."""
    tuned = task.record.tuned[name]
    losses = [np.inf if loss is None or not np.isfinite(loss) else loss for loss in tuned["loss"]]
    points = [tables.point_text(point) for point in tuned["grid"]]
    by_loss = sorted(zip(losses, points, strict=True), key=lambda pair: pair[0])
    return {
        "name": name,
        "text": tables.tuning_text(name, tuned),
        "placed": _place(charts, tuning_chart(task, name)),
        "rows": [TableRow([point, tables.loss_text(loss)]) for loss, point in by_loss],
    }


def _standing_row(
    standing: Standing, ranking: Sequence[Standing], tasks: int, looks: dict[str, Look]
) -> TableRow:
    """Row of an optimizer in the table over all tasks, with a bar for each interval."""
    name, look = standing.optimizer, looks[standing.optimizer]
    is_reference = name == REFERENCE
    one = Interval(np.ones(()), np.ones(()), np.ones(()))
    bars: list[Markup | None] = []
    for field in tables.standing_columns(standing.rival):
        if field not in ("speedup", "over_rival", "speedup_grads", "ratio"):
            bars.append(None)
            continue
        # What the column compares with has no interval in it.
        is_one = is_reference if field != "over_rival" else standing.over_rival is None
        intervals = [getattr(s, field) for s in ranking if s.optimizer != REFERENCE]
        own = one if is_one else getattr(standing, field)
        bars.append(_bar(own, [i for i in intervals if i], look.colour))
    return TableRow(
        cells=tables.standing_cells(standing, tasks),
        legend_entry=LegendEntry(name, *look),
        reference=is_reference,
        bars=bars,
    )


def _bar(interval: Interval | None, column: Sequence[Interval], colour: str) -> Markup | None:
    """An SVG of an interval on the logarithmic axis of its column, with a mark at 1."""
    if interval is None or not 0 < interval.mean < np.inf:
        return None
    means = [float(i.mean) for i in column if 0 < i.mean < np.inf]
    low, high = 0.7 * min([*means, 1.0]), 1.4 * max([*means, 1.0])

    def place(value: Any) -> float:
        share = np.log(np.clip(float(value), low, high) / low) / np.log(high / low)
        return float(64 * share)

    return Markup(
        '<svg width="64" height="14" viewBox="0 0 64 14" aria-hidden="true">'
        '<line x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="14" stroke="var(--soft)"'
        ' stroke-dasharray="2 2"/>'
        '<line x1="{left:.1f}" x2="{right:.1f}" y1="7" y2="7" stroke="{colour}" stroke-width="4"'
        ' stroke-opacity=".4"/><circle cx="{mean:.1f}" cy="7" r="3.5" fill="{colour}"/></svg>'
    ).format(
        one=place(1.0),
        left=place(interval.low),
        right=place(interval.high),
        mean=place(interval.mean),
        colour="currentColor" if colour == INK else colour,
    )


def _soften_interval(cell: str) -> Markup:
    """The cell with the interval behind its value in a softer colour."""
    return Markup(re.sub(r"(\[.*\])$", r'<span class="range">\1</span>', str(escape(cell))))


def _json(value: Any) -> Markup:
    """JSON in which a user's name cannot end the script element."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _bokeh_script() -> str:
    resources = Resources(mode="inline", components=["bokeh"], minified=True)
    return "\n".join(resources.js_raw).replace("</script", "<\\/script")
