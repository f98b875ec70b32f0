"""Tasks, data sets and networks: sizes, splits, known constants, and messages on bad data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import datasets, networks, tasks
from metaopt.datasets import Dataset, check, split_in_three


def size(params):
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "net, shape, expected",
    [
        (networks.MLP((20, 10)), (1, 28, 28, 1), 15_910),
        (networks.MLP((20, 2)), (1, 2), 102),
        (networks.CNN(10), (1, 28, 28, 1), 7_306),
        (networks.CNN(10), (1, 32, 32, 3), 7_706),
        (
            networks.CNN(50, (8, 16, 32, 32, 64), (3, 3, 3, 3, 1), (2, 2, 2, 1, 1)),
            (1, 64, 64, 3),
            97_442,
        ),
    ],
)
def test_networks_have_the_papers_number_of_parameters(net, shape, expected):
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape))["params"]
    assert sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes)) == expected


def test_initial_weights_and_biases_are_uniform_within_one_over_sqrt_fan_in():
    params = networks.MLP((400, 10)).init(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    for leaf in jax.tree.leaves(params["Dense_0"]):
        bound = 100**-0.5
        assert jnp.abs(leaf).max() <= bound
        np.testing.assert_allclose(jnp.std(leaf), bound / 3**0.5, rtol=0.1)


def test_digits_are_the_whole_data_set_split_without_overlap():
    from sklearn.datasets import load_digits

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
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    data = datasets.spirals()
    train, test = (
        (np.asarray(data.splits[s]["x"]), np.asarray(data.splits[s]["y"]))
        for s in ("train", "test")
    )
    assert LogisticRegression().fit(*train).score(*test) < 0.75
    assert KNeighborsClassifier().fit(*train).score(*test) > 0.97


def test_classification_loss_and_accuracy_follow_their_definitions(digits):
    params = digits.init(jax.random.key(0))
    batch = digits.sample(jax.random.key(1), ())
    assert batch["x"].shape == (64, 8, 8, 1)
    x = np.asarray(batch["x"], np.float64).reshape(64, 64) / 16.0
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    hidden = np.maximum(x @ w["Dense_0"]["kernel"] + w["Dense_0"]["bias"], 0.0)
    logits = hidden @ w["Dense_1"]["kernel"] + w["Dense_1"]["bias"]
    y = np.asarray(batch["y"])
    log_likelihood = logits[np.arange(64), y] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(digits.loss(params, batch), -log_likelihood.mean(), rtol=1e-5)
    np.testing.assert_allclose(digits.accuracy(params, batch), (logits.argmax(1) == y).mean())


def test_batches_come_from_their_split_and_have_the_leading_shape(digits):
    batches = digits.sample(jax.random.key(0), (3, 2), "valid")
    assert batches["x"].shape == (3, 2, 64, 8, 8, 1)
    valid = {x.tobytes() for x in np.asarray(digits.whole("valid")["x"])}
    drawn = np.asarray(batches["x"]).reshape(-1, 8, 8, 1)
    assert {x.tobytes() for x in drawn} <= valid


def test_quadratic_has_the_curvature_that_it_states():
    task = tasks.quadratic(dim=6, condition=50.0, largest=4.0)
    x = task.init(jax.random.key(0))
    values = np.linalg.eigvalsh(jax.hessian(task.loss)(x, jnp.zeros(6)))
    np.testing.assert_allclose([values[0], values[-1]], [4.0 / 50.0, 4.0], rtol=1e-5)
    assert task.loss(jnp.zeros(6), task.whole()) == 0.0


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
    with pytest.raises(ValueError, match=match):
        check(Dataset("mine", {"train": {"x": x, "y": y}}, num_classes=2))
    with pytest.raises(ValueError, match="'mine'"):
        tasks.classification(
            networks.MLP((2,)), Dataset("mine", {"train": {"x": x, "y": y}}, num_classes=2)
        )


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="at least 10 examples"):
        split_in_three("mine", X[:3], Y[:3], 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tasks.classification(networks.MLP((2,)), datasets.moons(), batch_size=0)
    with pytest.raises(ValueError, match="condition"):
        tasks.quadratic(condition=0.5)
    with pytest.raises(ValueError, match="dim"):
        tasks.quadratic(dim=0)
