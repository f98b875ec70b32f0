"""Times compiled programs in turn, so that a machine that slows down slows all of them."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Rounds = list[dict[str, float]]
"""Seconds of each program, by name, in every round."""


def keep_to_one_core() -> None:
    """Restricts this process to one core, on Linux; call it before JAX counts the cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def time_in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> Rounds:
    """Calls every program once per round; a call must block until its results are ready."""
    measurements = []
    for _ in range(rounds):
        seconds = {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
        measurements.append(seconds)
    return measurements


def median_seconds(rounds: Rounds) -> dict[str, float]:
    """The median of each program's seconds."""
    return {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}


def median_ratio(rounds: Rounds, name: str, reference: str) -> float:
    """The median, over rounds, of the seconds of `name` divided by those of `reference`."""
    return statistics.median(seconds[name] / seconds[reference] for seconds in rounds)
