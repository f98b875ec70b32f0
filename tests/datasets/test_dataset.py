"""Data sets: bad arrays are refused by name; classes are chosen, joined and relabelled exactly."""

import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import datasets, tasks
from metaopt.core.types import SPLITS
from metaopt.datasets import Dataset, check, split_in_three
from metaopt.tasks import networks

X, Y = np.zeros((12, 2), np.float32), np.zeros(12, np.int32)


@pytest.mark.parametrize(
    "x, y, match",
    [
        (X[:0], Y[:0], "empty"),
        (X, Y[:5], "12 inputs, but 5 labels"),
        (np.where(np.arange(12)[:, None] == 3, np.nan, X), Y, "1 of 12 inputs hold NaN"),
        (
            np.where(np.arange(12)[:, None] == 3, 1e308, X.astype(float)),
            Y,
            "1 of 12 inputs hold NaN or inf",
        ),
        (X, Y.astype(np.float32), "labels must be integers"),
        (X, Y + 7, r"labels must lie in 0..1, got 7..7"),
    ],
)
def test_a_bad_data_set_is_refused_by_its_name(x, y, match):
    data = Dataset("mine", {split: {"x": x, "y": y} for split in SPLITS}, num_classes=2)
    with pytest.raises(ValueError, match=match):
        check(data)
    with pytest.raises(ValueError, match="'mine'"):
        tasks.classification(networks.MLP((2,)), data)


def test_fewer_than_ten_examples_are_not_split():
    with pytest.raises(ValueError, match="at least 10 examples"):
        split_in_three("mine", X[:3], Y[:3], 2)


def test_chosen_classes_are_kept_whole_and_relabelled():
    data = datasets.digits()
    part = datasets.only_classes(data, [7, 2])
    assert part.num_classes == 2
    for split, examples in data.splits.items():
        for new, old in ((0, 7), (1, 2)):
            kept = np.asarray(part.splits[split]["x"])[np.asarray(part.splits[split]["y"]) == new]
            original = np.asarray(examples["x"])[np.asarray(examples["y"]) == old]
            np.testing.assert_array_equal(kept, original)


@pytest.mark.parametrize(
    "classes, match", [([], "not empty"), ([1, 1], "distinct"), ([0, 10], r"0\.\.9, got \[0, 10\]")]
)
def test_chosen_classes_must_be_distinct_labels_of_the_data_set(classes, match):
    with pytest.raises(ValueError, match=match):
        datasets.only_classes(datasets.digits(), classes)


def test_a_union_holds_all_examples_and_its_labels_follow_on():
    digits = datasets.digits()
    both = datasets.union(digits, digits)
    assert both.num_classes == 20 and both.name == "digits"
    labels = np.asarray(both.splits["test"]["y"])
    np.testing.assert_array_equal(labels[:360] + 10, labels[360:])
    np.testing.assert_array_equal(both.splits["test"]["x"][:360], digits.splits["test"]["x"])


def test_a_union_needs_images_of_one_shape():
    digits = datasets.digits()
    with pytest.raises(ValueError, match="one shape and scale"):
        datasets.union(digits, datasets.resized(digits, 28))
    same_name = datasets.resized(digits, 16)._replace(name="digits", scale=digits.scale)
    with pytest.raises(ValueError, match="one shape and scale"):
        datasets.union(digits, same_name)
    with pytest.raises(ValueError, match="at least one data set"):
        datasets.union()


def test_resized_images_repeat_the_pixels():
    digits = datasets.digits()
    large = datasets.resized(digits, 16)
    x, y = digits.splits["test"]["x"], large.splits["test"]["x"]
    assert y.shape == (360, 16, 16, 1) and y.dtype == jnp.uint8
    expected = np.kron(np.asarray(x)[..., 0] / 16.0, np.ones((1, 2, 2)))
    np.testing.assert_allclose(np.asarray(y)[..., 0] * large.scale, expected, atol=0.5 / 255)
    with pytest.raises(ValueError, match="holds no images"):
        datasets.resized(datasets.moons(), 28)


def test_fewer_held_out_examples_are_evenly_spaced_and_training_stays_whole():
    data = datasets.digits()
    fewer = datasets.with_fewer_held_out(data, 90)
    for split, spacing in (("valid", 2), ("test", 4)):
        for name, array in data.splits[split].items():
            np.testing.assert_array_equal(fewer.splits[split][name], array[::spacing])
    assert fewer.splits["train"] is data.splits["train"]
    more = datasets.with_fewer_held_out(data, 10_000)
    np.testing.assert_array_equal(more.splits["test"]["x"], data.splits["test"]["x"])
    with pytest.raises(ValueError, match="with_fewer_held_out: most must be at least 1, got 0"):
        datasets.with_fewer_held_out(data, 0)
