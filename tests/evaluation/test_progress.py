"""What a person sees of an evaluation that runs."""

import io

from rich.console import Console

from metaopt.evaluation.progress import progress


def shown(terminal: bool) -> str:
    """Of two optimizers with four windows each; the second is left after its first window."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with progress("MLP [10] on digits", 4, console) as begun:
        tick = begun("SGD", 2)
        for done in range(1, 5):
            tick(done)
        begun("RACE(mine, SGD)", 1)(1)
    return console.file.getvalue()


def test_a_terminal_shows_optimizers_times_windows():
    last = [line for line in shown(terminal=True).splitlines() if "%" in line][-1]
    assert "MLP [10] on digits" in last and "RACE(mine, SGD)" in last
    assert "62%" in last  # 5 of 8 windows


def test_elsewhere_there_is_a_line_per_optimizer():
    lines = shown(terminal=False).splitlines()
    assert lines == ["MLP [10] on digits: SGD", "MLP [10] on digits: RACE(mine, SGD)"]


def test_a_worker_beside_others_writes_lines(monkeypatch):
    monkeypatch.setattr("metaopt.evaluation.progress.parent_process", object)
    assert "%" not in shown(terminal=True)
