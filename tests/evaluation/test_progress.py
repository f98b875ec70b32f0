"""Progress of an evaluation, as text on a terminal and elsewhere."""

import io

from rich.console import Console

from metaopt.evaluation.progress import progress


def output(terminal: bool) -> str:
    """The output for two optimizers of four windows each, after one window of the second."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with progress("MLP [10] on digits", 4, console) as begin:
        tick = begin("SGD", 2)
        for done in range(1, 5):
            tick(done)
        begin("RACE(mine, SGD)", 1)(1)
    return console.file.getvalue()


def test_a_terminal_shows_optimizers_times_windows():
    last = [line for line in output(terminal=True).splitlines() if "%" in line][-1]
    assert "MLP [10] on digits" in last and "RACE(mine, SGD)" in last
    assert "62%" in last  # 5 of 8 windows


def test_without_a_terminal_there_is_a_line_per_optimizer():
    lines = output(terminal=False).splitlines()
    assert lines == ["MLP [10] on digits: SGD", "MLP [10] on digits: RACE(mine, SGD)"]


def test_a_worker_process_writes_lines(monkeypatch):
    monkeypatch.setattr("metaopt.evaluation.progress.parent_process", object)
    assert "%" not in output(terminal=True)
