"""Networks with running statistics and dropout as tasks, against Flax's own calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stateful

import metaopt
from metaopt import datasets, tasks
from metaopt.core.types import SPLITS, Task, single
from metaopt.tasks.checking import check_family, check_start
from metaopt.tasks.pretraining import pretrain


class Dropped(nn.Module):
    """Dropout, and no state."""

    units: int = 2

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.units)(nn.Dropout(0.5, deterministic=not train)(x))


class Unaware(nn.Module):
    """BatchNorm in a module that is not told the mode."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=False)(x))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_losses_of_both_modes_are_those_of_flax(rate):
    task, key = stateful.batchnorm_task(rate), jax.random.key(0)
    params, model_state = task.init(key), task.init_model_state(key)
    batch = task.sample(jax.random.key(1), ())
    # Other statistics than those of the start.
    stats = jax.tree.map(lambda leaf: leaf + 0.5, model_state["batch_stats"])
    loss, changed = task.loss(params, {"batch_stats": stats}, batch)
    expected, new_stats = stateful.loss_fn(params, stats, batch, rate)
    stateful.assert_close((loss, changed), (expected, {"batch_stats": new_stats}))
    for examples in (batch, task.whole("valid")):
        found = task.eval_loss(params, {"batch_stats": stats}, examples)
        expected = stateful.eval_loss(params, stats, examples, rate)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0.0 <= task.accuracy(params, {"batch_stats": stats}, batch) <= 1.0


def test_every_mini_batch_of_a_random_loss_has_a_key_of_its_own():
    task = stateful.batchnorm_task(0.5)
    batches = task.sample(jax.random.key(0), (3, 2))
    assert batches["key"].shape == (3, 2) and "key" not in task.whole()
    assert len(np.unique(jax.random.key_data(batches["key"]).reshape(6, -1), axis=0)) == 6
    assert "key" not in stateful.batchnorm_task(0.0).sample(jax.random.key(0), (3, 2))
    # The examples are those of the task without dropout.
    plain = stateful.batchnorm_task(0.0).sample(jax.random.key(0), (3, 2))
    np.testing.assert_array_equal(batches["x"], plain["x"])


def test_dropout_alone_has_two_modes_and_no_model_state():
    task = tasks.classification(Dropped(), stateful.moons(), batch_size=16)
    params = task.init(jax.random.key(0))
    assert task.init_model_state(jax.random.key(0)) is None
    batches = task.sample(jax.random.key(1), (2,))
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    x = stateful.moons().scale * first["x"]
    for train, found in ((True, task.loss), (False, task.eval_loss)):
        logits = Dropped().apply({"params": params}, x, train=train, rngs={"dropout": first["key"]})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, first["y"])
        np.testing.assert_allclose(found(params, first), losses.mean(), rtol=1e-5)
    tx = optax.sgd(0.1)
    metaopt.unroll(tx, params, tx.init(params), task.loss, batches)


def test_a_state_without_modes_is_refused_with_what_to_do():
    task = tasks.classification(Unaware(), stateful.moons())
    with pytest.raises(ValueError, match=r"classification: net keeps batch_stats .*argument `tra"):
        task.init(jax.random.key(0))
    with pytest.raises(ValueError, match="pretrain: net has a model state"):
        pretrain(stateful.Net(), stateful.moons())


def test_a_language_model_may_drop_units():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Embed(32, 4)(x)
            return nn.Dense(32)(nn.Dropout(0.5, deterministic=not train)(x))

    text = datasets.text_from_string("mine", "to be or not to be " * 60)
    task = tasks.language_model(Net(), text, batch_size=3, length=12)
    params, batch = task.init(jax.random.key(0)), task.sample(jax.random.key(1), ())
    other = {**batch, "key": jax.random.key(9)}
    assert task.loss(params, batch) != task.loss(params, other)
    assert task.eval_loss(params, batch) == task.eval_loss(params, other)
    check_family("mine", single(task), SPLITS)


def few_class(pretrained=None, **settings):
    return tasks.few_class(
        stateful.Net(0.2),
        stateful.moons(),
        pretrained,
        head="Dense_1",
        classes=(0, 1),
        ways=2,
        **settings,
    )


def test_fine_tuning_begins_with_the_statistics_of_the_pretrained_network():
    params, stats = stateful.first_variables(jax.random.key(5))
    stats = jax.tree.map(lambda leaf: leaf + 1.0, stats)
    family = few_class(params, model_state={"batch_stats": stats})
    check_family("mine", family, SPLITS)
    task = family.task(jnp.array([1, 0]))
    stateful.assert_close(task.init_model_state(jax.random.key(0)), {"batch_stats": stats})
    fresh = few_class()
    check_start("mine", fresh)
    first = fresh.task(jnp.array([0, 1])).init_model_state(jax.random.key(0))
    assert not first["batch_stats"]["BatchNorm_0"]["mean"].any()


def test_a_pretrained_network_needs_its_statistics():
    params, stats = stateful.first_variables(jax.random.key(5))
    with pytest.raises(ValueError, match="few_class: model_state is missing"):
        few_class(params)
    with pytest.raises(ValueError, match="few_class: model_state is given"):
        few_class(model_state={"batch_stats": stats})


WRONG = {
    "no function": ({"eval_loss": 3}, "eval_loss must be a function or None, got 3"),
    "no state": ({"init_model_state": lambda key: None}, "init_model_state: must return a pytree"),
    "no arrays": ({"init_model_state": lambda key: {"n": "1"}}, "init_model_state: TypeError"),
    "state lost": ({"loss": lambda x, s, b: jnp.sum(x)}, r"loss: .*return \(loss, new_model_st"),
    "loss without state": ({"loss": lambda x, b: jnp.sum(x)}, "loss: TypeError.*positional"),
    "other leaves": (
        {"loss": lambda x, s, b: (jnp.sum(x), {"m": s["n"]})},
        r"loss: the model state that the loss returned: .* missing \['n'\]",
    ),
    "pair": ({"eval_loss": lambda x, s, b: (jnp.sum(x), s)}, "eval_loss: .*got a tuple"),
    "accuracy": ({"accuracy": lambda x, b: 0.5}, "accuracy: TypeError.*positional"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_task_is_named(case):
    task = Task(
        init=lambda key: jnp.ones(2),
        loss=lambda x, s, batch: (jnp.sum(x), {"n": s["n"] + 1}),
        sample=lambda key, shape, split="train": jnp.zeros(shape),
        whole=lambda split="test": jnp.zeros(()),
        init_model_state=lambda key: {"n": 0},
        eval_loss=lambda x, s, batch: jnp.sum(x),
    )
    check_family("mine", single(task), SPLITS)
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=f"mine: .*{message}"):
        check_family("mine", single(task.replace(**changes)), SPLITS)
