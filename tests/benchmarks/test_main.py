"""The command line of the benchmarks."""

import json

import pytest
from rich.table import Table

from benchmarks import __main__ as command
from benchmarks import step


def test_prints_the_table_and_writes_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step, "run", lambda: {"device": "a device"})
    monkeypatch.setattr(step, "table", lambda record: Table(record["device"]))
    command.main(["step", "--out", str(tmp_path / "records" / "step.json")])
    assert "a device" in capsys.readouterr().out
    assert json.loads((tmp_path / "records" / "step.json").read_text()) == {"device": "a device"}


def test_an_unknown_benchmark_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command.main(["everything"])
    assert "invalid choice: 'everything'" in capsys.readouterr().err
