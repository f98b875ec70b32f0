"""`metaopt report`: draw the records of an evaluation."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from metaopt import report


@dataclass(frozen=True)
class ReportJob:
    """Draw an evaluation: report.html, summary.md and figures in its folder.

    Attributes:
      folder: the --out folder of `metaopt evaluate`.
    """

    folder: tyro.conf.Positional[Path]


def run(job: ReportJob) -> None:
    """Writes the report and prints its summary."""
    report.print_summary(report.report(job.folder))
