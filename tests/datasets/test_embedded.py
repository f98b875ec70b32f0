"""Embedded data sets: sizes, splits, reproducibility; and messages on bad data."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from metaopt import datasets, tasks
from metaopt.core.types import SPLITS
from metaopt.datasets import Dataset, check, split_in_three
from metaopt.tasks import networks


def test_digits_are_the_whole_data_set_split_without_overlap():
    data = datasets.digits()
    sizes = {split: len(e["y"]) for split, e in data.splits.items()}
    assert sizes == {"train": 1257, "valid": 180, "test": 360}
    rows = np.concatenate([np.asarray(e["x"]).reshape(-1, 64) for e in data.splits.values()])
    original = load_digits().data.astype(np.uint8)
    sort = lambda a: a[np.lexsort(a.T)]
    np.testing.assert_array_equal(sort(rows), sort(original))
    assert data.splits["train"]["x"].dtype == jnp.uint8


@pytest.mark.parametrize("make", [datasets.moons, datasets.circles, datasets.spirals])
def test_planar_data_sets_are_balanced_and_reproducible(make):
    data, again = make(), make()
    labels = np.concatenate([e["y"] for e in data.splits.values()])
    np.testing.assert_array_equal(np.bincount(labels), [1000, 1000])
    np.testing.assert_array_equal(data.splits["test"]["x"], again.splits["test"]["x"])


def test_spirals_need_more_than_a_straight_line():
    data = datasets.spirals()
    train, test = (
        (np.asarray(data.splits[s]["x"]), np.asarray(data.splits[s]["y"]))
        for s in ("train", "test")
    )
    assert LogisticRegression().fit(*train).score(*test) < 0.75
    assert KNeighborsClassifier().fit(*train).score(*test) > 0.97


X, Y = np.zeros((12, 2), np.float32), np.zeros(12, np.int32)


@pytest.mark.parametrize(
    "x, y, match",
    [
        (X[:0], Y[:0], "empty"),
        (X, Y[:5], "12 inputs, but 5 labels"),
        (np.where(np.arange(12)[:, None] == 3, np.nan, X), Y, "1 of 12 inputs hold NaN"),
        (X, Y.astype(np.float32), "labels must be integers"),
        (X, Y + 7, r"labels must lie in 0..1, got 7..7"),
    ],
)
def test_bad_data_is_named(x, y, match):
    data = Dataset("mine", {split: {"x": x, "y": y} for split in SPLITS}, num_classes=2)
    with pytest.raises(ValueError, match=match):
        check(data)
    with pytest.raises(ValueError, match="'mine'"):
        tasks.classification(networks.MLP((2,)), data)


def test_too_few_examples_to_split_are_named():
    with pytest.raises(ValueError, match="at least 10 examples"):
        split_in_three("mine", X[:3], Y[:3], 2)
