"""Report of an evaluation: an HTML page, tables, and figures for papers. Imports no JAX."""

from pathlib import Path
from typing import Any

from metaopt.core.extras import optional_imports
from metaopt.core.files import write_whole

with optional_imports("report", needed_by="metaopt.report"):
    from metaopt.report import figures, page, summary, tables
    from metaopt.report.tables import print_summary as print_summary


def report(folder: Path) -> dict[str, Any]:
    """Writes ``report.html``, ``summary.md`` and figures next to the records in `folder`.

    Returns:
      ``{"evaluation": Evaluation, "page": path, "summary": path, "figures": [paths]}``.

    Raises:
      ValueError: when `folder` holds no evaluation, or none of its tasks has a curve yet.
    """
    evaluation = summary.load(folder)
    paths = figures.draw(evaluation, folder / "figures")
    write_whole(folder / "report.html", page.render(evaluation, folder).encode())
    write_whole(folder / "summary.md", tables.markdown(evaluation).encode())
    return {
        "evaluation": evaluation,
        "page": folder / "report.html",
        "summary": folder / "summary.md",
        "figures": paths,
    }
