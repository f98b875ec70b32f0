"""How many distinct bad inputs the tables of this folder hold."""

import importlib
import pickle
from pathlib import Path

from refusals import BAD_INPUTS, bomb

LEAST = 200


def test_there_are_enough_of_them(capsys):
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(path.stem)
    number = sum(map(len, BAD_INPUTS.values()))
    with capsys.disabled():
        print(f"\n{number} distinct bad inputs are refused:")
        for boundary, names in BAD_INPUTS.items():
            print(f"  {len(names):4d} {boundary}")
    assert number >= LEAST


def test_the_bomb_would_go_off(tmp_path):
    """Else the marker's absence would show nothing."""
    pickle.loads(bomb(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()
