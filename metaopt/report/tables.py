"""Cells of the tables, and the tables in Markdown and on the terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metaopt.evaluation.statistics import Interval
from metaopt.report.summary import (
    REFERENCE,
    Evaluation,
    Row,
    Standing,
    TaskData,
    factor,
    headline,
    rows,
    standings,
)

NONE = "–"
STANDING_COLUMNS = (
    "optimizer",
    "speed-up (steps)",
    "speed-up (gradients)",
    "final loss ratio",
    "wins / ties / losses",
    "diverged",
)
# Columns for which 80 characters leave no room.
WIDE = {
    "final loss ratio",
    f"steps to {REFERENCE}'s loss",
    f"against {REFERENCE}",
    "against published",
}
FEW_SEEDS = 5


def loss_text(value: Any) -> str:
    """Four digits that matter; far off, the order of magnitude says it all."""
    value = float(value)
    if not np.isfinite(value):
        return "not finite" if value > 0 else NONE
    if value != 0 and not 1e-3 <= abs(value) < 1e3:
        return f"{value:.1e}"
    return f"{value:.4f}"


def with_interval(interval: Interval | None, form: Any) -> str:
    """``mean [low, high]``."""
    if interval is None:
        return NONE
    if not np.isfinite(interval.mean):
        return form(interval.mean)
    return f"{form(interval.mean)} [{form(interval.low)}, {form(interval.high)}]"


def percent(value: Any) -> str:
    """``93.1%``."""
    return f"{100 * float(value):.1f}%"


def row_columns(made: Sequence[Row]) -> list[str]:
    """Headers of a task's table; columns that would be empty are left out."""
    columns = ["optimizer", "final test loss"]
    columns += ["accuracy"] if any(row.accuracy for row in made) else []
    if any(row.speedup for row in made):
        columns += ["speed-up", f"steps to {REFERENCE}'s loss", f"against {REFERENCE}"]
    columns += ["diverged"]
    return columns + (["against published"] if any(r.velodrome is not None for r in made) else [])


def row_cells(row: Row, columns: Sequence[str]) -> list[str]:
    """The cells of one row under `row_columns`."""
    cells = {
        "optimizer": row.optimizer,
        "final test loss": with_interval(row.loss, loss_text),
        "accuracy": percent(row.accuracy.mean) if row.accuracy else NONE,
        "speed-up": with_interval(row.speedup, factor),
        f"steps to {REFERENCE}'s loss": f"{row.steps:.0f}" if np.isfinite(row.steps) else "never",
        f"against {REFERENCE}": row.outcome or "reference",
        "diverged": f"{row.diverged:.0%}",
        "against published": NONE if row.velodrome is None else f"{factor(row.velodrome)}×",
    }
    if row.optimizer == REFERENCE:
        cells["speed-up"] = "1"
    return [cells[column] for column in columns]


def standing_cells(standing: Standing, tasks: int) -> list[str]:
    """The cells of one optimizer under `STANDING_COLUMNS`."""
    name = standing.optimizer
    name += f" ({standing.tasks} of {tasks} tasks)" if standing.tasks < tasks else ""
    diverged = f"{standing.diverged:.0%}"
    if standing.optimizer == REFERENCE:
        return [name, "1", "1", "1", NONE, diverged]
    intervals = (standing.speedup, standing.speedup_grads, standing.ratio)
    counts = f"{standing.wins} / {standing.ties} / {standing.losses}"
    return [name, *(with_interval(i, factor) for i in intervals), counts, diverged]


def point_text(point: dict[str, Any]) -> str:
    """``lr 0.1, cosine``."""
    words = {True: "yes", False: "no"}
    show = lambda v: words[v] if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else v
    return ", ".join(
        str(show(value)) if name == "schedule" else f"{name} {show(value)}"
        for name, value in point.items()
    )


def tuning_text(name: str, tuned: dict[str, Any]) -> str:
    """Which grid a baseline was tuned on, what it cost, and what won."""
    return (
        f"{name} was tuned on the validation split over {len(tuned['grid'])} points x "
        f"{tuned['seeds']} seeds: {tuned['runs']:,} runs, {tuned['grad_evals']:,} gradient "
        f"evaluations, {tuned['seconds']:.3g} s. Chosen: {point_text(tuned['point'])}."
    )


def caveats(evaluation: Evaluation) -> list[str]:
    """What a reader has to know before believing the intervals."""
    seeds = min(len(c.loss) for task in evaluation.tasks for c in task.curves.values())
    there = {*(task.folder for task in evaluation.tasks), *evaluation.refused}
    missing = [name for name in evaluation.index["tasks"] if name not in there]
    found = list(evaluation.refused.values())
    if seeds < FEW_SEEDS:
        found.append(
            f"Only {seeds} seed{'s' * (seeds > 1)} per optimizer: intervals from fewer than "
            f"{FEW_SEEDS} are too narrow, with one they have no width."
        )
    if missing:
        found.append(f"Not finished, and not in this report: {', '.join(missing)}.")
    if not any(REFERENCE in task.curves for task in evaluation.tasks):
        found.append(f"Tuned {REFERENCE} was not run, so that there is no speed-up.")
    return found


EXPLAINED = (
    f"Speed-up: how many times fewer steps (or gradient evaluations) than tuned {REFERENCE} for "
    f"the same loss, seed by seed. An optimizer that does not reach {REFERENCE}'s final loss gets "
    f"the share of its steps after which {REFERENCE} had reached its best loss; one that diverged "
    f"gets 0. Final loss ratio: its final test loss over {REFERENCE}'s. Both are interquartile "
    "means over all runs of all tasks, with 95% stratified-bootstrap intervals. A task is tied if "
    "the 95% bootstrap interval of the paired difference of final losses contains 0. Diverged: the "
    "final loss is not finite or above twice the first."
)


def markdown(evaluation: Evaluation) -> str:
    """The report as a Markdown page."""
    job, number = evaluation.index["job"], len(evaluation.tasks)
    found = standings(evaluation)
    lines = ["# Evaluation", "", *map(_plain, headline(evaluation, found)), ""]
    lines += [f"Suite `{job.get('suite', '')}`, {job.get('seeds', '')} seeds.", ""]
    lines += [f"Note: {text}\n" for text in caveats(evaluation)]
    if found:
        lines += ["## All tasks", "", *_table(STANDING_COLUMNS)]
        lines += [_line(standing_cells(standing, number)) for standing in found]
        lines += ["", EXPLAINED, ""]
    for task in evaluation.tasks:
        lines += _task_lines(task)
    return "\n".join(lines).rstrip() + "\n"


def _task_lines(task: TaskData) -> list[str]:
    made = rows(task)
    columns = row_columns(made)
    lines = [f"## {_plain(task.record.title)}", "", *_table(columns)]
    lines += [_line(row_cells(row, columns)) for row in made]
    lines += [""]
    if task.record.velodrome:
        lines += [f"Published curve: {_plain(task.record.velodrome['name'])}.", ""]
    for name, tuned in task.record.tuned.items():
        lines += [tuning_text(name, tuned), ""]
    for name, why in task.record.left_out.items():
        lines += [f"Left out: {_plain(name)}: {_plain(why)}", ""]
    return lines


def _table(columns: Sequence[str]) -> list[str]:
    return [_line(columns), "|" + "---|" * len(columns)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """Neither a table's bars nor HTML; names are the user's."""
    for character, code in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(character, code)
    return " ".join(text.split())


def print_summary(result: dict[str, Any], console: Console | None = None) -> None:
    """The tables on the terminal, and where everything is."""
    console = console or Console()
    evaluation: Evaluation = result["evaluation"]
    first, rest = headline(evaluation, standings(evaluation))
    console.print(escape(first), style="bold", highlight=False)
    if rest:
        console.print(escape(rest), highlight=False)
    for text in caveats(evaluation):
        console.print(f"note: {escape(text)}", style="yellow", highlight=False)
    for task in evaluation.tasks:
        made = rows(task)
        columns = row_columns(made)
        _print(console, task.record.title, columns, [row_cells(row, columns) for row in made])
    if found := standings(evaluation):
        number = len(evaluation.tasks)
        cells = [standing_cells(standing, number) for standing in found]
        _print(console, f"all tasks ({number})", STANDING_COLUMNS, cells)
    console.print(f"page     {result['page']}", soft_wrap=True, markup=False)
    console.print(f"table    {result['summary']}", soft_wrap=True, markup=False)
    for path in result["figures"]:
        if path.suffix == ".png":
            console.print(f"figure   {path}", soft_wrap=True, markup=False)


def _print(
    console: Console, title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]
) -> None:
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        padding=(0, 1), pad_edge=False,
    )  # fmt: skip
    shown = [i for i, column in enumerate(columns) if column not in WIDE]
    for i in shown:
        table.add_column(columns[i], justify="right" if i else "left", no_wrap=i < 2)
    for line in cells:  # with the intervals of the second column only
        brief = (line[i] if i == 1 else line[i].split(" [")[0] for i in shown)
        table.add_row(*map(escape, brief))
    console.print(table)
