"""`metaopt bench`: run a benchmark of the folder ``benchmarks`` of a clone."""

import importlib
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class BenchJob:
    """Measure speed as ratios within one run; needs a clone of the repository.

    Attributes:
      what: step (optimizer updates against Adam's), depth (compilation and time for 110 tensors),
        guards (a guarded training step against one without a guard), windows (of guards against
        their parts), meta (meta-training against bare SGD runs, and two processes against one).
      out: where to write the record as JSON; empty: nowhere.
    """

    what: tyro.conf.Positional[Literal["step", "depth", "guards", "windows", "meta"]] = "step"
    out: str = ""


def run(job: BenchJob) -> None:
    """Runs a benchmark and prints its table.

    Raises:
      ValueError: when the folder ``benchmarks`` cannot be imported.
    """
    try:
        benchmarks = importlib.import_module("benchmarks.__main__")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.__main__"):
            raise
        raise ValueError(
            "bench: the benchmarks are not in the installed package; run them in a clone of the "
            f"repository: python -m benchmarks {job.what}"
        ) from None
    benchmarks.main([job.what, *(["--out", job.out] if job.out else [])])
