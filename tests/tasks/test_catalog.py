"""Tasks by name: what they hold, what they need; on the real data where it is prepared."""

import jax
import numpy as np
import pytest

from metaopt.core.rollouts import train_loss
from metaopt.core.trees import leaf_names
from metaopt.core.types import TaskFamily
from metaopt.tasks import catalog, pretraining
from metaopt.tasks.catalog import TASKS, class_split

EMBEDDED = [name for name, entry in TASKS.items() if catalog.missing_data(name) == []]


@pytest.mark.parametrize("name", [n for n in EMBEDDED if "finetune" not in n])
def test_tasks_can_be_built_and_name_their_head(name):
    family = catalog.family(name)
    shapes = jax.eval_shape(
        lambda key: family.task(family.sample(key)).init(key), jax.random.key(0)
    )
    head = TASKS[name].head
    assert not head or any(leaf.startswith(f"{head}/") for leaf in leaf_names(shapes))

    def first_loss(key, params):
        task = family.task(family.sample(key))
        return train_loss(task.loss, params, task.init_model_state(key), task.sample(key, ()))

    assert jax.eval_shape(first_loss, jax.random.key(0), shapes).shape == ()


def test_classes_are_split_in_half_and_quarters_without_overlap():
    split = class_split(20)
    assert [len(part) for part in split] == [10, 5, 5]
    assert sorted(c for part in split for c in part) == list(range(20))
    assert split == class_split(20)


def test_tasks_say_which_data_they_miss(monkeypatch, tmp_path):
    monkeypatch.setenv("METAOPT_DATA_DIR", str(tmp_path))
    assert catalog.missing_data("finetune-A") == ["mnist", "fashion_mnist"]
    assert catalog.missing_data("digits") == []
    with pytest.raises(ValueError, match="metaopt data prepare mnist"):
        catalog.build("mnist-mlp20")


@pytest.mark.parametrize("name, loss", [("mnist-mlp20", 2.3), ("fashion-cnn3", 2.3)])
def test_real_tasks_start_at_the_loss_of_guessing(real_data, name, loss):
    for data in TASKS[name].data:
        real_data(data)
    task = catalog.build(name)
    params = task.init(jax.random.key(0))
    whole = task.whole("test")
    assert whole["x"].shape == (10000, 28, 28, 1)
    np.testing.assert_allclose(jax.jit(task.loss)(params, whole), np.log(10), atol=0.1)


def test_fine_tuning_starts_from_a_network_that_knows_its_classes(real_data, monkeypatch):
    for data in TASKS["finetune-A"].data:
        real_data(data)
    calls = []

    def short(folder, net, data):
        params, accuracy = pretraining.pretrained(folder, net, data, pretraining.Recipe(200))
        calls.append(accuracy)
        return params, accuracy

    monkeypatch.setattr(catalog, "pretrained", short)
    family = catalog.build("finetune-A")
    assert isinstance(family, TaskFamily)
    assert calls[0] > 0.8  # of 10 classes, after 200 steps
    again = catalog.build("finetune-B")  # the same start, read from the cache
    assert calls[1] == calls[0] and isinstance(again, TaskFamily)
    chosen = np.asarray(family.sample(jax.random.key(0)))
    assert set(chosen) <= set(class_split(20).test)
    body = lambda task: task.task(chosen).init(jax.random.key(0))["Conv_0"]["kernel"]
    np.testing.assert_array_equal(body(family), body(again))


def test_another_recipe_is_another_network(tmp_path):
    from metaopt import datasets
    from metaopt.tasks import networks

    data, net = datasets.moons(), networks.MLP((4, 2))
    recipe = pretraining.Recipe(100, lr=0.05)
    first, accuracy = pretraining.pretrained(tmp_path, net, data, recipe)
    assert accuracy > 0.7
    (file,) = tmp_path.glob("*.cache")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])  # a damaged one is trained again
    again, _ = pretraining.pretrained(tmp_path, net, data, recipe)
    np.testing.assert_array_equal(again["Dense_0"]["kernel"], first["Dense_0"]["kernel"])
    for other in (recipe._replace(num_steps=50), recipe._replace(seed=1)):
        params, _ = pretraining.pretrained(tmp_path, net, data, other)
        assert not np.array_equal(params["Dense_0"]["kernel"], first["Dense_0"]["kernel"])
    wider = networks.MLP((5, 2))
    assert pretraining.pretrained(tmp_path, wider, data, pretraining.Recipe(50))[0]["Dense_0"][
        "kernel"
    ].shape == (2, 5)
    with pytest.raises(ValueError, match="multiple of 50, got 70"):
        pretraining.pretrain(net, data, pretraining.Recipe(70))
