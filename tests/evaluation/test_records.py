"""Records survive a round trip; errors name the broken file."""

import json
import pickle

import numpy as np
import pytest

from metaopt.evaluation import records
from metaopt.evaluation.records import CurveRecord, Curves, Grid, TaskRecord


def test_curves_and_grids_survive_a_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    curves = Curves(
        steps=np.arange(3),
        grad_evals=np.arange(3),
        seconds=np.sort(rng.random(3)),
        loss=rng.random((2, 3)),
        accuracy=rng.random((2, 3)),
        train_loss=np.full((2, 3), np.nan),
        windows=np.array([5, 10]),
        state={"alpha": rng.random((2, 2, 4, 2)), "accepted": np.array([[True, False]] * 2)},
    )
    records.write_arrays(tmp_path / "curves.npz", curves)
    again = records.read_curves(tmp_path / "curves.npz")
    for name in Curves._fields[:-1]:
        np.testing.assert_array_equal(getattr(again, name), getattr(curves, name))
    assert again.state.keys() == curves.state.keys()
    for name, value in curves.state.items():
        np.testing.assert_array_equal(again.state[name], value)
    grid = Grid(np.arange(2), rng.random((4, 2, 2)), np.array(1.5))
    records.write_arrays(tmp_path / "grid.npz", grid)
    for read, written in zip(records.read_grid(tmp_path / "grid.npz"), grid, strict=True):
        np.testing.assert_array_equal(read, written)


def test_a_record_survives_a_round_trip(tmp_path):
    entry = CurveRecord(
        file="l3rs.npz", kind="learned", learned="L3RS", layers=("a", "b"), bases=("sgd",)
    )
    tuned = {"SGD": {"point": {"schedule": "constant", "lr": 0.1}, "loss": [1.0, float("inf")]}}
    record = TaskRecord(
        title="digits, 100 steps",
        task="digits",
        num_steps=100,
        window=10,
        tuned=tuned,
        curves={"L3RS": entry},
        left_out={"x": "reason"},
        velodrome={},
    )
    records.write_record(tmp_path / "task", record)
    assert records.read_record(tmp_path / "task") == record
    assert records.read_record(tmp_path / "another") is None


@pytest.mark.parametrize(
    "content, match",
    [
        ('{"title": "digits"', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        ('{"title": "digits"}', "not a record of format 2"),
        ('{"curves": {"L3RS": {"files": "x"}}}', "not a record of format 2"),
        ("[1, 2]", "not a record of format 2"),
    ],
)
def test_the_error_of_a_broken_record_names_its_file(tmp_path, content, match):
    file = tmp_path / records.RECORD
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{records.RECORD}: {match}"):
        records.read_record(tmp_path)


def test_the_error_of_another_format_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"holds no evaluation\.json"):
        records.read_index(tmp_path)
    (tmp_path / records.INDEX).write_text(json.dumps({"job": {}}))
    with pytest.raises(ValueError, match=r"format None, but this version reads 2.*--overwrite"):
        records.read_index(tmp_path)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("kind", ["object array", "pickle", "truncated", "missing field"])
def test_broken_curves_are_refused_and_nothing_is_executed(tmp_path, kind):
    file = tmp_path / "curves.npz"
    if kind == "object array":
        np.savez(file, steps=np.array([Trap()], dtype=object))
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Trap()))
    else:
        np.savez(file, steps=np.arange(3))
        if kind == "truncated":
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"curves\.npz: not the arrays of a Curves"):
        records.read_curves(file)
