"""Tables of an evaluation, in Markdown and on the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metaopt.core.checks import printable
from metaopt.evaluation.statistics import AVERAGED, TIED, Interval
from metaopt.report.break_even import BreakEven, break_evens
from metaopt.report.looks import MOST_PANELS
from metaopt.report.summary import (
    REFERENCE,
    Evaluation,
    Row,
    Standing,
    TaskData,
    at_edges,
    factor,
    headline,
    rows,
    standings,
)

NONE = "–"
# Columns that are left out on the terminal, since 80 characters have no room for them.
WIDE = {
    "meta-training",
    "final loss ratio",
    f"steps to {REFERENCE}'s loss",
    f"against {REFERENCE}",
    "against published",
}
BREAK_EVEN_COLUMNS = ("optimizer", "instead of", "meta-training", "saved per job", "pays after")
FEW_SEEDS = 5
MOST_EDGES = 10  # searches that a note names

EXPLANATION = (
    f"Final loss: the mean over the last {AVERAGED} measurements of a run. Speed-up: how many "
    f"times fewer steps (or gradient evaluations) than tuned {REFERENCE} an optimizer needs to "
    f"reach {REFERENCE}'s final loss, seed by seed. If it never reaches that loss, the speed-up is "
    f"the cost at which {REFERENCE} reaches the optimizer's lowest loss, divided by the "
    'optimizer\'s whole cost. If it diverges, the speed-up is 0. A column "over ...": the '
    "speed-up in steps over the baseline with the lowest final loss on most tasks, if it wins more "
    f"tasks than it loses to {REFERENCE}. Final loss ratio: its final test "
    f"loss divided by {REFERENCE}'s. Speed-ups and ratios are interquartile means over all runs of "
    "all tasks, with 95% stratified-bootstrap intervals. A task is a tie if the 95% bootstrap "
    "interval of the paired difference of final losses contains 0, or if its mean is below "
    f"{100 * TIED:g}% of {REFERENCE}'s. Diverged: the final loss is not "
    "finite or more than twice the first loss."
)

BREAK_EVEN_EXPLANATION = (
    "A job is one run on one of these tasks. A meta-trained optimizer saves what its rival needs "
    "to reach its own final loss, less what the optimizer needs for it (by the speed-up over this "
    "rival), plus the grid search of a rival that is tuned for each job. No guard is charged. "
    "Seconds are those of this machine; they count the compilation of searches and of the "
    "meta-training, but not that of single runs."
)


def loss_text(value: Any) -> str:
    """A loss with four decimals; very small and very large ones in scientific notation."""
    value = float(value)
    if not np.isfinite(value):
        return "not finite" if value > 0 else NONE
    if value != 0 and not 1e-3 <= abs(value) < 1e3:
        return f"{value:.1e}"
    return f"{value:.4f}"


def with_interval(interval: Interval | None, text: Callable[[Any], str]) -> str:
    """``mean [low, high]``, each number written by `text`."""
    if interval is None:
        return NONE
    if not np.isfinite(interval.mean):
        return text(interval.mean)
    return f"{text(interval.mean)} [{text(interval.low)}, {text(interval.high)}]"


def percent(value: Any) -> str:
    """A fraction as ``93.1%``."""
    return f"{100 * float(value):.1f}%"


def row_columns(table: Sequence[Row]) -> list[str]:
    """Headers of a task's table; columns that would be empty are left out."""
    columns = ["optimizer", "final test loss"]
    if any(row.accuracy for row in table):
        columns.append("accuracy")
    if any(row.speedup for row in table):
        columns += ["speed-up", f"steps to {REFERENCE}'s loss", f"against {REFERENCE}"]
    columns.append("diverged")
    if any(row.velodrome is not None for row in table):
        columns.append("against published")
    return columns


def row_cells(row: Row, columns: Sequence[str]) -> list[str]:
    """Cells of one row under `row_columns`."""
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


def standing_columns(rival: str | None) -> dict[str, str]:
    """Fields of `Standing` -> headers of the table over all tasks; `rival` is theirs."""
    return {
        "optimizer": "optimizer",
        "speedup": "speed-up (steps)",
        **({"over_rival": f"over {rival}"} if rival else {}),
        "speedup_grads": "speed-up (gradients)",
        "ratio": "final loss ratio",
        "wins": "wins / ties / losses",
        "diverged": "diverged",
    }


def standing_cells(standing: Standing, tasks: int) -> list[str]:
    """Cells of one optimizer under `standing_columns`; `tasks` is the number of all tasks."""
    name, rival = standing.optimizer, standing.rival
    if standing.tasks < tasks:
        name += f" ({standing.tasks} of {tasks} tasks)"
    over_rival = "1" if standing.optimizer == rival else with_interval(standing.over_rival, factor)
    cells = {"optimizer": name, "over_rival": over_rival, "diverged": f"{standing.diverged:.0%}"}
    if standing.optimizer == REFERENCE:
        cells |= {"speedup": "1", "speedup_grads": "1", "ratio": "1", "wins": NONE}
    else:
        cells |= {
            "speedup": with_interval(standing.speedup, factor),
            "speedup_grads": with_interval(standing.speedup_grads, factor),
            "ratio": with_interval(standing.ratio, factor),
            "wins": f"{standing.wins}/{standing.ties}/{standing.losses}",
        }
    return [cells[field] for field in standing_columns(rival)]


def break_even_cells(entry: BreakEven) -> list[str]:
    """Cells under `BREAK_EVEN_COLUMNS`."""

    def cost(value: float) -> str:
        if not np.isfinite(value):
            return NONE
        if entry.charge == "seconds":
            return f"{value:,.3g} s"
        return f"{value:,.0f} gradient{'' if round(value) == 1 else 's'}"

    jobs = f"{np.ceil(entry.jobs):,.0f} jobs" if np.isfinite(entry.jobs) else "never"
    return [
        entry.optimizer,
        f"{entry.rival}, tuned for each job" if entry.tuned else entry.rival,
        cost(entry.spent),
        cost(entry.saved),
        jobs,
    ]


def point_text(point: dict[str, Any]) -> str:
    """A point of a grid as ``lr 0.1, cosine``."""

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, dict):  # of groups of leaves
            return f"({', '.join(f'{group} {text(rate)}' for group, rate in value.items())})"
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(
        text(value) if name == "schedule" else f"{name} {text(value)}"
        for name, value in point.items()
    )


def tuning_text(name: str, tuned: dict[str, Any]) -> str:
    """The grid of a baseline, the cost of its search and the chosen point."""
    rates = tuned.get("extended", 0)
    plural = "" if rates == 1 else "s"
    extended = f", with {rates} learning rate{plural} beyond the first grid" if rates else ""
    return (
        f"{name} was tuned on the validation split over {len(tuned['grid'])} points x "
        f"{tuned['seeds']} seeds: {tuned['runs']:,} runs, {tuned['grad_evals']:,} gradient "
        f"evaluations, {tuned['seconds']:.3g} s{extended}. Chosen: {point_text(tuned['point'])}."
    )


def caveats(evaluation: Evaluation) -> list[str]:
    """What a reader must know to judge the numbers: few seeds, missing tasks, no reference."""
    seeds = min(len(c.loss) for task in evaluation.tasks for c in task.curves.values())
    known = {*(task.folder for task in evaluation.tasks), *evaluation.refused}
    unfinished = [name for name in evaluation.index["tasks"] if name not in known]
    notes = list(evaluation.refused.values())
    if seeds < FEW_SEEDS:
        notes.append(
            f"Only {seeds} seed{'s' if seeds > 1 else ''} per optimizer: bootstrap intervals from "
            f"fewer than {FEW_SEEDS} seeds are too narrow, and from one seed they have no width."
        )
    if edges := at_edges(evaluation):
        if len(edges) > MOST_EDGES:
            edges = [*edges[:MOST_EDGES], f"and {len(edges) - MOST_EDGES} more searches"]
        notes.append(
            "The best learning rate is the lowest or highest one that was tried, and a better one "
            f"may lie beyond it: {', '.join(edges)}."
        )
    if unfinished:
        notes.append(f"Not finished and not in this report: {', '.join(unfinished)}.")
    if len(evaluation.tasks) > MOST_PANELS:
        notes.append(f"Figures show the first {MOST_PANELS} of {len(evaluation.tasks)} tasks.")
    if not any(REFERENCE in task.curves for task in evaluation.tasks):
        notes.append(f"Tuned {REFERENCE} was not run, so there is no speed-up.")
    return notes


def subject(job: Mapping[str, Any]) -> tuple[str, str]:
    """What an evaluation is about: ``("suite", name)``, or ``("task", names)``."""
    kind = "task" if job.get("task") else "suite"
    return kind, str(job.get(kind, ""))


def markdown(evaluation: Evaluation) -> str:
    """The report as a Markdown page."""
    job, ranking = evaluation.index["job"], standings(evaluation)
    lines = ["# Evaluation", "", *map(_plain, headline(evaluation, ranking)), ""]
    kind, name = subject(job)
    name = _plain(name).replace("`", "'")
    lines += [f"{kind.title()} `{name}`, {_plain(str(job.get('seeds', '')))} seeds.", ""]
    lines += [f"Note: {_plain(note)}\n" for note in caveats(evaluation)]
    if ranking:
        number, columns = len(evaluation.tasks), list(standing_columns(ranking[0].rival).values())
        lines += ["## All tasks", "", *_header_lines(columns)]
        lines += [_table_line(standing_cells(standing, number)) for standing in ranking]
        lines += ["", EXPLANATION, ""]
    if entries := break_evens(evaluation):
        lines += ["## When the meta-training pays", "", *_header_lines(BREAK_EVEN_COLUMNS)]
        lines += [_table_line(break_even_cells(entry)) for entry in entries]
        lines += ["", BREAK_EVEN_EXPLANATION, ""]
    for task in evaluation.tasks:
        lines += _task_lines(task)
    return "\n".join(lines).rstrip() + "\n"


def _task_lines(task: TaskData) -> list[str]:
    table = rows(task)
    columns = row_columns(table)
    lines = [f"## {_plain(task.record.title)}", "", *_header_lines(columns)]
    lines += [_table_line(row_cells(row, columns)) for row in table]
    lines += [""]
    if task.record.velodrome:
        lines += [f"Published curve: {_plain(task.record.velodrome['name'])}.", ""]
    for name, tuned in task.record.tuned.items():
        lines += [_plain(tuning_text(name, tuned)), ""]
    for name, reason in task.record.left_out.items():
        lines += [f"Left out: {_plain(name)}: {_plain(reason)}", ""]
    return lines


def _header_lines(columns: Sequence[str]) -> list[str]:
    return [_table_line(columns), "|" + "---|" * len(columns)]


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """The text of a user's name with HTML and the bars of tables escaped, on one line."""
    for character, code in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(character, code)
    return printable(text)


def print_summary(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables and the paths of all files on the terminal.

    Args:
      result: what `metaopt.report.report` returned.
      console: where to print, by default stdout.
    """
    console = console or Console()
    evaluation: Evaluation = result["evaluation"]
    ranking = standings(evaluation)
    first, details = headline(evaluation, ranking)
    console.print(_shown(first), style="bold", highlight=False)
    if details:
        console.print(_shown(details), highlight=False)
    for note in caveats(evaluation):
        console.print(f"note: {_shown(note)}", style="yellow", highlight=False)
    for task in evaluation.tasks:
        table = rows(task)
        columns = row_columns(table)
        cells = [row_cells(row, columns) for row in table]
        _print_table(console, task.record.title, columns, cells)
    if ranking:
        number, columns = len(evaluation.tasks), list(standing_columns(ranking[0].rival).values())
        cells = [standing_cells(standing, number) for standing in ranking]
        _print_table(console, f"all tasks ({number})", columns, cells)
    if entries := break_evens(evaluation):
        cells = list(map(break_even_cells, entries))
        _print_table(console, "when the meta-training pays", BREAK_EVEN_COLUMNS, cells)
    console.print(f"page     {result['page']}", soft_wrap=True, markup=False)
    console.print(f"table    {result['summary']}", soft_wrap=True, markup=False)
    for path in result["figures"]:
        if path.suffix == ".png":
            console.print(f"figure   {path}", soft_wrap=True, markup=False)


def _shown(text: str) -> str:
    """The text of a user's name without markup of rich or control of the terminal."""
    return escape(printable(text))


def _print_table(
    console: Console, title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]
) -> None:
    """Prints a table without its wide columns, with intervals in the second column if they fit."""
    table = _terminal_table(title, columns, cells, interval=True)
    if console.measure(table).maximum > console.width:
        table = _terminal_table(title, columns, cells, interval=False)
    console.print(table)


def _terminal_table(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], *, interval: bool
) -> Table:
    table = Table(
        title=_shown(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    printed = [i for i, column in enumerate(columns) if column not in WIDE]
    for i in printed:
        # Headers break between words: a column is as wide as its longest word or cell.
        header = columns[i].replace(" /", "/").replace(" ", "\n") if i > 1 else columns[i]
        table.add_column(header, justify="right" if i else "left", no_wrap=i < 2)
    for line in cells:
        kept = [line[i] if interval and i == 1 else line[i].split(" [")[0] for i in printed]
        table.add_row(*map(_shown, kept))
    return table
