"""The benchmark of windows, at a small size: its record and its table; nothing about speed."""

import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks import windows as bench
from benchmarks import workload


@pytest.fixture(scope="module")
def record():
    return bench.run(repeats=1, n_t=1, n_c=1, batch_size=4, networks=("MLP-20",), hidden=2)


def test_every_guard_is_measured_against_its_own_parts(record):
    assert [row["guard"] for row in record["rows"]] == ["lgl2o", "race", "gl2o", "smg", "amg"]
    for row in record["rows"]:
        assert row["window_ms"] > 0 and row["ideal_ms"] > 0
        assert set(row["parts_ms"]) == set(bench.IDEALS[row["guard"]])
        np.testing.assert_allclose(row["ratio"], row["window_ms"] / row["ideal_ms"])
        np.testing.assert_allclose(row["overhead"], row["window_ms"] / row["together_ms"])
    assert json.loads(json.dumps(record)) == record


def test_the_table_names_every_guard(record):
    console = Console(width=120, record=True)
    console.print(bench.table(record))
    text = console.export_text()
    assert all(name in text for name in ("MLP-20", "lgl2o", "race", "gl2o", "smg", "amg", "15,910"))


def test_the_images_are_real_and_28_pixels_wide():
    data = workload.images()
    x = data.splits["train"]["x"]
    assert x.shape[1:] == (28, 28, 1) and x.max() == 16 and np.ptp(np.asarray(x[0])) > 0
