"""An evaluation folder that all tests of the report share."""

from pathlib import Path

import numpy as np
import pytest
from evaluations import HOSTILE, contenders, descend, write_index, write_task


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """An evaluation with two finished tasks and one that was not started."""
    out = tmp_path_factory.mktemp("evaluation")
    rates = [0.1, 0.3, 1.0]
    grid = np.stack([descend(rate) for rate in rates])
    left_out = {"Other": f"theta was made for layers {HOSTILE}."}
    velodrome = {"name": "MLP on MNIST", "speedup": {"SGD": 1.25}}
    write_task(
        out / "0-first",
        "first quadratic",
        contenders(0),
        tuned={"SGD": (rates, grid)},
        left_out=left_out,
        velodrome=velodrome,
    )
    tuned = {"SGD": (rates, grid)}
    write_task(out / "1-second", f"second {HOSTILE}", contenders(1), tuned=tuned)
    training = {
        "step": [1, 2, 3],
        "meta_loss": [2.0, 1.0, None],
        "validation_loss": [None, 1.5, 1.2],
    }
    write_index(out, ["0-first", "1-second", "2-third"], training={HOSTILE: training})
    return out
