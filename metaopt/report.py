"""Records of an evaluation -> figures, a table in Markdown, and a summary for the screen."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from metaopt import checkpoints, plots
from metaopt.config import BASELINES
from metaopt.evaluation import Curves
from metaopt.jobs import INDEX, RECORD, folder_name, read_curves
from metaopt.statistics import divergence_rate, mean_interval, steps_to_reach
from metaopt.training import METRICS, read_metrics

REFERENCE = BASELINES["adam"].name


@dataclass(frozen=True)
class Row:
    """One optimizer on one task.

    Attributes: loss: final test loss (mean, low, high); accuracy: final mean in percent; steps:
    until tuned Adam's final loss (inf: never); diverged: share of seeds.
    """

    optimizer: str
    loss: tuple[float, float, float]
    accuracy: float
    steps: float
    diverged: float


def report(folder: Path) -> dict[str, Any]:
    """Writes figures and ``summary.md`` beside the records of `folder`.

    Returns:
      ``{"rows": {task title: [Row]}, "figures": [paths], "summary": path}``.
    """
    index_path = folder / INDEX
    if not index_path.exists():
        raise ValueError(
            f"{folder}: holds no {INDEX}; give the --out folder of `metaopt evaluate`."
        )
    index = json.loads(index_path.read_text())
    records = {
        task: json.loads((folder / task / RECORD).read_text())
        for task in index["tasks"]
        if (folder / task / RECORD).exists()
    }
    if not records:
        raise ValueError(f"{folder}: the evaluation has no finished task; run it again to resume.")
    panels, targets, rows = {}, {}, {}
    for task, record in records.items():
        curves = {n: read_curves(folder / task / file) for n, file in record["curves"].items()}
        title = record["title"]
        panels[title] = {name: _line(c) for name, c in curves.items()}
        target = panels[title][REFERENCE].mean[-1] if REFERENCE in curves else float("nan")
        targets[title] = (f"tuned {REFERENCE} at the end", target)
        rows[title] = [_row(name, c, target) for name, c in curves.items()]
    figures = plots.curves_figure(panels, folder / "figures" / "comparison", targets=targets)
    figures += _training_figures(index["job"], folder)
    figures += _mixture_figures(index, folder, *next(iter(records.items())))
    summary = folder / "summary.md"
    summary.write_text(_markdown(index["job"], list(records.values()), rows))
    return {"rows": rows, "figures": figures, "summary": summary}


def print_summary(result: dict[str, Any], console: Console | None = None) -> None:
    """The table on one screen, and where everything is."""
    console = console or Console()
    for title, rows in result["rows"].items():
        table = Table(title=title, title_justify="left", title_style="bold", expand=False)
        for column in ("optimizer", "final test loss", "accuracy", f"steps to {REFERENCE}'s loss"):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for row in rows:
            table.add_row(*_cells(row))
        console.print(table)
    console.print(f"table    {result['summary']}")
    for path in result["figures"]:
        if path.suffix == ".png":
            console.print(f"figure   {path}", soft_wrap=True)


def _line(curves: Curves) -> plots.Line:
    interval = mean_interval(curves.loss)
    return plots.Line(curves.steps, interval.mean, interval.low, interval.high)


def _row(name: str, curves: Curves, target: float) -> Row:
    final = mean_interval(curves.loss[:, -1])
    return Row(
        name,
        (float(final.mean), float(final.low), float(final.high)),
        float(100 * np.mean(curves.accuracy[:, -1])),
        steps_to_reach(curves.steps, curves.loss.astype(np.float64).mean(axis=0), target),
        divergence_rate(curves.loss),
    )


def _cells(row: Row) -> list[str]:
    mean, low, high = row.loss
    steps = f"{row.steps:.0f}" if np.isfinite(row.steps) else "never"
    form = ".4f" if mean < 1e3 else ".0e"  # far off: the order of magnitude says it all
    loss = f"{mean:{form}} [{low:{form}}, {high:{form}}]" if np.isfinite(mean) else "not finite"
    loss += f" ({row.diverged:.0%} of runs diverged)" if row.diverged else ""
    return [row.optimizer, loss, f"{row.accuracy:.1f}%", steps]


def _markdown(
    job: dict[str, Any], records: list[dict[str, Any]], rows: dict[str, list[Row]]
) -> str:
    lines = [
        "# Evaluation",
        "",
        f"Suite `{job['suite']}`, {job['seeds']} seeds. Loss: mean over seeds of the final loss on "
        "the test split with its 95% bootstrap interval. Steps: the first measured step at which "
        f"the mean loss is at most that of tuned {REFERENCE} at its end.",
    ]
    for record, (title, task_rows) in zip(records, rows.items(), strict=True):
        header = f"| optimizer | final test loss | accuracy | steps to {REFERENCE}'s loss |"
        lines += ["", f"## {title}", "", header, "|---|---|---|---|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in task_rows]
        lines += [""]
        for name, tuned in record["tuned"].items():
            lines += [
                f"{BASELINES[name].name} tuned on the validation split over rates {tuned['rates']} "
                f"x {sorted(tuned['grid'])}, {tuned['runs']} runs: {tuned['lr']} "
                f"{tuned['schedule']}.",
                "",
            ]
        lines += [f"Left out: {name}: {why}" for name, why in record["left_out"].items()]
    return "\n".join(lines).rstrip() + "\n"


def _exports(job: dict[str, Any]) -> list[tuple[Path, checkpoints.Exported]]:
    """The checkpoints that are still where they were; records are drawn without them too."""
    found = []
    for path in map(Path, job["checkpoints"]):
        with contextlib.suppress(checkpoints.CheckpointError):
            found.append((path, checkpoints.load(path)))
    return found


def _training_figures(job: dict[str, Any], folder: Path) -> list[Path]:
    """Meta-loss of every checkpoint that is a run folder, and of the run it started from."""
    runs = {}
    for path, export in _exports(job):
        start = Path(export.trained.get("warm_start") or "/")
        run = path.parent if path.name == "export" else path
        for label, source in (
            (f"{folder_name(path)}: warm start", start),
            (folder_name(path), run),
        ):
            if (source / METRICS).exists():
                runs[label] = read_metrics(source)
    return plots.meta_training_figure(runs, folder / "figures" / "meta_training") if runs else []


def _mixture_figures(
    index: dict[str, Any], folder: Path, task: str, record: dict[str, Any]
) -> list[Path]:
    """lambda and alpha of every L3RS checkpoint on the first task of the suite."""
    figures = []
    for path, export in _exports(index["job"]):
        name = folder_name(path)
        if name not in record["curves"]:
            continue
        curves = read_curves(folder / task / record["curves"][name])
        if "alpha" in curves.state:
            layers = list(export.theta.get("embedding", {}))
            layers = layers or [f"layer {i}" for i in range(curves.state["alpha"].shape[2])]
            figures += plots.mixture_figure(
                curves.steps[1:],
                np.mean(curves.state["lambda_"], axis=0),
                np.mean(curves.state["alpha"], axis=0),
                layers,
                [str(base) for base in export.config["base"]],
                folder / "figures" / f"mixture-{name.lower()}",
            )
    return figures
