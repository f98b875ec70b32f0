"""Embedded data sets: sizes, splits, reproducibility."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from metaopt import datasets


def test_digits_are_the_whole_data_set_split_without_overlap():
    data = datasets.digits()
    sizes = {split: len(examples["y"]) for split, examples in data.splits.items()}
    assert sizes == {"train": 1257, "valid": 180, "test": 360}
    parts = [np.asarray(examples["x"]).reshape(-1, 64) for examples in data.splits.values()]
    rows, original = np.concatenate(parts), load_digits().data.astype(np.uint8)
    sort = lambda array: array[np.lexsort(array.T)]
    np.testing.assert_array_equal(sort(rows), sort(original))
    assert data.splits["train"]["x"].dtype == jnp.uint8


def test_features_of_breast_cancer_are_standardised_on_the_training_examples():
    splits = datasets.breast_cancer().splits
    train = np.asarray(splits["train"]["x"])
    np.testing.assert_allclose(train.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), 1.0, atol=1e-5)
    # An affine map of the original, so that a linear fit between the two is exact.
    rows = np.concatenate([np.asarray(examples["x"]) for examples in splits.values()])
    original = load_breast_cancer()
    labels = np.concatenate([examples["y"] for examples in splits.values()])
    assert rows.shape == original.data.shape
    assert labels.sum() == original.target.sum()
    for ours, theirs in zip(rows.T, original.data.T, strict=True):
        slope, shift = np.polyfit(np.sort(ours), np.sort(theirs), 1)
        np.testing.assert_allclose(
            slope * np.sort(ours) + shift, np.sort(theirs), atol=1e-5 * np.ptp(theirs)
        )
    fit = LogisticRegression().fit(train, splits["train"]["y"])
    assert fit.score(splits["test"]["x"], splits["test"]["y"]) > 0.93  # rows keep their labels


@pytest.mark.parametrize("make", [datasets.moons, datasets.circles, datasets.spirals])
def test_planar_data_sets_are_balanced_and_reproducible(make):
    data, again = make(), make()
    labels = np.concatenate([examples["y"] for examples in data.splits.values()])
    np.testing.assert_array_equal(np.bincount(labels), [1000, 1000])
    np.testing.assert_array_equal(data.splits["test"]["x"], again.splits["test"]["x"])


def test_spirals_are_separable_but_not_linearly():
    splits = datasets.spirals().splits
    train = np.asarray(splits["train"]["x"]), np.asarray(splits["train"]["y"])
    test = np.asarray(splits["test"]["x"]), np.asarray(splits["test"]["y"])
    assert LogisticRegression().fit(*train).score(*test) < 0.75
    assert KNeighborsClassifier().fit(*train).score(*test) > 0.97
