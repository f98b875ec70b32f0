"""Functions that test_processes.py calls in other processes, which import this file by its name."""

import json
import os
import sys
import time
from pathlib import Path

from metaopt.core.processes import in_processes


def report(folder: Path, name: str) -> None:
    """Writes down in which process and on which cores it runs."""
    facts = {"process": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}
    (folder / name).write_text(json.dumps(facts))


def fail(*arguments) -> None:
    raise ValueError("the call's own error")


def leave(status) -> None:
    sys.exit(status)


def end_abruptly(*arguments) -> None:
    os._exit(1)


def write_on(folder: Path, name: str) -> None:
    """Goes on writing until its process is ended."""
    while True:
        (folder / name).write_text("still here")
        time.sleep(0.005)


if __name__ == "__main__":
    in_processes(write_on, [(Path(sys.argv[1]), name) for name in "ab"], workers=2)
