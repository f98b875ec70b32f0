"""Runs one benchmark, prints its table, and writes its record: ``python -m benchmarks WHAT``."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from metaopt.evaluation.records import write_json

BENCHMARKS = ("step", "depth", "guards", "windows", "meta")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
      argv: arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure speed as ratios within one run."
    )
    parser.add_argument("what", choices=BENCHMARKS, help="the benchmark")
    parser.add_argument("--out", type=Path, help="where to write the record as JSON")
    args = parser.parse_args(argv)
    benchmark = importlib.import_module(f"benchmarks.{args.what}")
    record = benchmark.run()
    Console().print(benchmark.table(record))
    if args.out:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
