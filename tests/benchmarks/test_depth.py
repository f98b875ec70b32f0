"""The benchmark of many tensors, at a small size: its record and table; nothing about speed."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import depth as bench


@pytest.fixture(scope="module")
def record():
    return bench.run(stages=((2, 1), (3, 1)), repeats=1, learned=("l3rs",), guarded=("l3rs",))


def test_the_tree_is_that_of_a_resnet_34():
    params = jax.eval_shape(lambda: bench.residual_params(bench.STAGES))
    leaves = jax.tree.leaves(params)
    assert len(leaves) == 110
    # The size that torchvision documents for its resnet34: 21,797,672.
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == 21_797_672


def test_every_optimizer_is_measured_beside_adam(record):
    names = ["adam", "adamw", "l3rs", "race(l3rs, adamw)"]
    assert [row["optimizer"] for row in record["rows"]] == names
    for row in record["rows"]:
        assert min(row["trace_cpu_s"], row["compile_cpu_s"], row["ratio"]) > 0
    whole = {row["optimizer"]: row["trace_cpu_s"] + row["compile_cpu_s"] for row in record["rows"]}
    parts = whole["l3rs"] + whole["adamw"]
    np.testing.assert_allclose(record["rows"][-1]["parts"], whole["race(l3rs, adamw)"] / parts)
    assert json.loads(json.dumps(record)) == record


def test_the_table_names_every_optimizer(record):
    console = Console(width=120, record=True)
    console.print(bench.table(record))
    text = console.export_text()
    assert all(row["optimizer"] in text for row in record["rows"])
