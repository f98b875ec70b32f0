"""The page: one HTML file that needs nothing but a browser."""

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
from metaopt.report import plots, tables
from metaopt.report.charts import (
    INK,
    POINTS,
    Chart,
    Key,
    mixture_charts,
    training_chart,
    tuning_chart,
)
from metaopt.report.curves import METRICS, curves_chart
from metaopt.report.figures import COSTS, training_runs
from metaopt.report.looks import looks_of
from metaopt.report.summary import (
    REFERENCE,
    Evaluation,
    Standing,
    TaskData,
    headline,
    optimizers,
    rows,
    standings,
)

SVG_DASHES = {"-": "none", "--": "7 4", "-.": "7 3 2 3", ":": "2 3", "o": "0 8"}


class Placed(NamedTuple):
    """Attributes: number: of the chart on the page; chart."""

    number: int
    chart: Chart


class Line(NamedTuple):
    """A line of a table. Attributes: key: swatch before it; bars: an SVG per cell, or None."""

    cells: list[str]
    key: Key | None = None
    reference: bool = False
    bars: list[Markup | None] | None = None


def render(evaluation: Evaluation, folder: Path) -> str:
    """The whole page as text."""
    looks = looks_of(optimizers(evaluation), [task.curves for task in evaluation.tasks])
    charts: list[Chart] = []  # in the order in which the page numbers them
    found = standings(evaluation)
    first, rest = headline(evaluation, found)
    tasks = [_task(charts, task, looks) for task in evaluation.tasks]
    metrics = {field for chart in charts for field in chart.ranges.get("y", {})}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.filters["ranged"] = _ranged
    source = files("metaopt.report")
    text = lambda name: source.joinpath(name).read_text()
    runs = training_runs(evaluation.index)
    training = [_place(charts, training_chart(name, metrics)) for name, metrics in runs.items()]
    context = {
        "headline": first,
        "details": rest,
        "caveats": tables.caveats(evaluation),
        "standing_columns": tables.STANDING_COLUMNS,
        "standings": [_standing(s, found, len(tasks), looks) for s in found],
        "explained": tables.EXPLAINED,
        "tasks": tasks,
        "training": training,
        "data": _json(_data(charts)),
        "job": {"suite": "", "seeds": ""} | evaluation.index["job"],
        "environment": {"command": ""} | evaluation.index.get("environment", {}),
        "costs": COSTS,
        "metrics": {field: label for field, label in METRICS.items() if field in metrics},
        "reference": REFERENCE,
        "folder": folder,
        "ink": INK,
        "points": POINTS,
        "svg_dashes": SVG_DASHES,
        "many_layers": plots.MANY_LAYERS,
        "css": Markup(text("page.css")),
        "script": Markup(text("page.js")),
        "bokeh": Markup(_bokeh()),
    }
    return environment.from_string(text("page.html")).render(context)


def _place(charts: list[Chart], chart: Chart) -> Placed:
    charts.append(chart)
    return Placed(len(charts) - 1, chart)


def _data(charts: Sequence[Chart]) -> dict[str, Any]:
    """What page.js reads."""
    ink = lambda chart: [i for i, key in enumerate(chart.keys) if key.colour == INK]
    made = [{"item": c.item, "ranges": c.ranges, "ink": ink(c)} for c in charts]
    return {"labels": COSTS | METRICS, "charts": made}


def _task(charts: list[Chart], task: TaskData, looks: dict[str, tuple[str, str]]) -> dict[str, Any]:
    made = rows(task)
    columns = tables.row_columns(made)
    lines = [
        Line(
            tables.row_cells(row, columns),
            Key(row.optimizer, *looks[row.optimizer]),
            row.optimizer == REFERENCE,
        )
        for row in made
    ]
    return {
        "folder": task.folder,
        "record": task.record,
        "every": max(int(np.diff(curves.steps).max()) for curves in task.curves.values()),
        "target": REFERENCE in task.curves,
        "switching": any("accepted" in curves.state for curves in task.curves.values()),
        "curves": _place(charts, curves_chart(task, looks)),
        "columns": columns,
        "rows": lines,
        "mixtures": [
            (name, [_place(charts, chart) for chart in panels])
            for name, panels in mixture_charts(task)
        ],
        "grids": [_grid(charts, task, name) for name in task.record.tuned],
    }


def _grid(charts: list[Chart], task: TaskData, name: str) -> dict[str, Any]:
    tuned = task.record.tuned[name]
    pairs = sorted(
        zip(tuned["loss"], map(tables.point_text, tuned["grid"]), strict=True),
        key=lambda pair: pair[0] if pair[0] is not None and np.isfinite(pair[0]) else np.inf,
    )
    return {
        "name": name,
        "text": tables.tuning_text(name, tuned),
        "placed": _place(charts, tuning_chart(task, name)),
        "lines": [
            Line([point, tables.loss_text(np.inf if loss is None else loss)])
            for loss, point in pairs
        ],
    }


def _standing(
    standing: Standing, found: Sequence[Standing], tasks: int, looks: dict[str, tuple[str, str]]
) -> Line:
    name = standing.optimizer
    reference = name == REFERENCE
    bars: list[Markup | None] = [None] * len(tables.STANDING_COLUMNS)
    one = Interval(*3 * (np.ones(()),))
    for column, field in ((1, "speedup"), (2, "speedup_grads"), (3, "ratio")):
        others = [getattr(s, field) for s in found if s.optimizer != REFERENCE]
        interval = one if reference else getattr(standing, field)
        bars[column] = _bar(interval, [i for i in others if i], looks[name][0])
    cells = tables.standing_cells(standing, tasks)
    return Line(cells, Key(name, *looks[name]), reference, bars)


def _bar(interval: Interval | None, others: Sequence[Interval], colour: str) -> Markup | None:
    """The interval on a log axis shared by `others`, with a mark at 1."""
    if interval is None or not 0 < interval.mean < np.inf:
        return None
    means = [float(i.mean) for i in others if 0 < i.mean < np.inf]
    low, high = np.log(0.7 * min([*means, 1.0])), np.log(1.4 * max([*means, 1.0]))
    place = lambda value: 64 * (np.log(np.clip(value, *np.exp((low, high)))) - low) / (high - low)
    mean, left, right = (place(float(x)) for x in interval)
    return Markup(
        '<svg width="64" height="14" viewBox="0 0 64 14" aria-hidden="true">'
        '<line x1="{one:.1f}" x2="{one:.1f}" y1="0" y2="14" stroke="var(--soft)"'
        ' stroke-dasharray="2 2"/>'
        '<line x1="{left:.1f}" x2="{right:.1f}" y1="7" y2="7" stroke="{colour}" stroke-width="4"'
        ' stroke-opacity=".4"/><circle cx="{mean:.1f}" cy="7" r="3.5" fill="{colour}"/></svg>'
    ).format(
        one=place(1.0), left=left, right=right, mean=mean,
        colour="currentColor" if colour == INK else colour,
    )  # fmt: skip


def _ranged(cell: str) -> Markup:
    """The interval behind a value in a softer colour."""
    return Markup(re.sub(r"(\[.*\])$", r'<span class="range">\1</span>', str(escape(cell))))


def _json(value: Any) -> Markup:
    """JSON that can end no script: names are the user's."""
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _bokeh() -> str:
    script = "\n".join(Resources(mode="inline", components=["bokeh"], minified=True).js_raw)
    return script.replace("</script", "<\\/script")
