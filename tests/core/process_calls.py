"""Functions that test_processes.py calls in other processes, which import this file by its name."""

import json
import os
from pathlib import Path


def report(folder: Path, name: str) -> None:
    """Writes down in which process and on which cores it runs."""
    facts = {"process": os.getpid(), "cores": sorted(os.sched_getaffinity(0))}
    (folder / name).write_text(json.dumps(facts))


def fail(*arguments) -> None:
    raise ValueError("the call's own error")
