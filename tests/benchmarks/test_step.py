"""The benchmark of single updates, at a small size: its record and table; nothing about speed."""

import json

import pytest
from rich.console import Console

from benchmarks import step as bench
from metaopt import optimizers


@pytest.fixture(scope="module")
def record():
    small = {"lstm": lambda: optimizers.lstm(2), "velo": lambda: optimizers.velo(4, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "LEARNED", small)
        return bench.run(sizes=(3, 2), repeats=2, names=("lstm", "velo"))


def test_every_optimizer_is_measured_next_to_adam(record):
    assert [row["optimizer"] for row in record["rows"]] == ["adam", "lstm", "velo"]
    assert record["params"] == 8 and record["sizes"] == [3, 2]
    for row in record["rows"]:
        assert min(row["step_ms"], row["adam_ms"], row["ratio"], row["compile_s"]) > 0
    assert json.loads(json.dumps(record)) == record


def test_the_state_is_counted_in_bytes_per_parameter(record):
    adam, lstm, velo = (row["state_bytes_per_param"] for row in record["rows"])
    assert adam == (2 * 8 * 4 + 4) / 8  # two moments and a count
    assert 2 * 2 * 2 * 4 <= lstm < 40  # (h, c) of two layers of 2 units, and counts
    # four accumulators, factored ones (3 for w's rows, columns; 3 x 2 for b), the LSTM's memory
    # (2 tensors), the loss buffer and two counts
    assert velo == 4 * (4 * 8 + 3 * (3 + 2) + 3 * 2 + 2 * 2 * 4 + 21 + 2) / 8


def test_the_table_names_every_optimizer(record):
    console = Console(width=120, record=True)
    console.print(bench.table(record))
    text = console.export_text()
    assert all(word in text for word in ("3-2", "adam", "lstm", "velo", "ratio"))


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"no optimizer \['adem'\]; there are"):
        bench.run(names=("adem",))
