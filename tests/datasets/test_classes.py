"""Classes of data sets: some of them, two sets as one, other sizes."""

import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import datasets


def test_chosen_classes_are_kept_whole_and_relabelled():
    data = datasets.digits()
    part = datasets.only_classes(data, [7, 2])
    assert part.num_classes == 2
    for split, examples in data.splits.items():
        for new, old in ((0, 7), (1, 2)):
            kept = np.asarray(part.splits[split]["x"])[np.asarray(part.splits[split]["y"]) == new]
            original = np.asarray(examples["x"])[np.asarray(examples["y"]) == old]
            np.testing.assert_array_equal(kept, original)


def test_a_union_holds_all_and_labels_follow_on():
    digits = datasets.digits()
    both = datasets.union(digits, digits)
    assert both.num_classes == 20 and both.name == "digits"
    labels = np.asarray(both.splits["test"]["y"])
    np.testing.assert_array_equal(labels[:360] + 10, labels[360:])
    np.testing.assert_array_equal(both.splits["test"]["x"][:360], digits.splits["test"]["x"])
    with pytest.raises(ValueError, match="one shape and scale"):
        datasets.union(digits, datasets.resized(digits, 28))


def test_resized_images_look_the_same():
    digits = datasets.digits()
    large = datasets.resized(digits, 16)
    x, y = digits.splits["test"]["x"], large.splits["test"]["x"]
    assert y.shape == (360, 16, 16, 1) and y.dtype == jnp.uint8
    expected = np.kron(np.asarray(x)[..., 0] / 16.0, np.ones((1, 2, 2)))
    np.testing.assert_allclose(np.asarray(y)[..., 0] * large.scale, expected, atol=0.5 / 255)
    with pytest.raises(ValueError, match="holds no images"):
        datasets.resized(datasets.moons(), 28)


@pytest.mark.parametrize(
    "classes, match", [([], "not empty"), ([1, 1], "distinct"), ([0, 10], r"0\.\.9, got \[0, 10\]")]
)
def test_classes_must_be_there(classes, match):
    with pytest.raises(ValueError, match=match):
        datasets.only_classes(datasets.digits(), classes)
