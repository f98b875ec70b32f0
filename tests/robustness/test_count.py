"""How many distinct bad inputs the tables of this folder hold; conftest.py prints who passed."""

import importlib
import pickle
from pathlib import Path

from refusals import BAD_INPUTS, bomb

LEAST = 200


def test_there_are_enough_of_them():
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(path.stem)
    number = sum(map(len, BAD_INPUTS.values()))
    assert number >= LEAST


def test_the_bomb_would_go_off(tmp_path):
    """Else the marker's absence would show nothing."""
    pickle.loads(bomb(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()
