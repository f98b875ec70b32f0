"""Hand-crafted baselines equal optax's own optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaopt import optimizers
from metaopt.core.rollouts import unroll
from metaopt.tasks import quadratic


def final(tx, steps=30):
    task = quadratic(dim=5)
    x = task.init(jax.random.key(0))
    batches = task.sample(jax.random.key(1), (steps,))
    return unroll(tx, x, tx.init(x), task.loss, batches)[0]


def schedule(t):
    return 0.5 / (t / 7.0 + 1.0) ** 1.5


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (optimizers.sgd(0.5, tau=7.0), optax.sgd(schedule)),
        (optimizers.sgd(0.5, tau=7.0, momentum=0.9), optax.sgd(schedule, momentum=0.9)),
        (optimizers.sgd(0.5, tau=None), optax.sgd(0.5)),
        (optimizers.adam(0.1), optax.adam(0.1)),
        (optimizers.adamw(0.1, weight_decay=0.01), optax.adamw(0.1, weight_decay=0.01)),
        (optimizers.adam(0.1, schedule="cosine"), optax.adam(optax.cosine_decay_schedule(0.1, 30))),
    ],
)
def test_equals_optax(ours, theirs):
    np.testing.assert_allclose(final(ours.apply({}, num_steps=30)), final(theirs), rtol=1e-6)


def test_power_decay_has_the_papers_values():
    lr = optimizers.power_decay()
    assert lr(0) == 3.0
    np.testing.assert_allclose(lr(50_000) / 3.0, 2**-1.5)
    expected = [1.06066, 0.57735, 0.031174]
    np.testing.assert_allclose([lr(5e4), lr(1e5), lr(1e6)], expected, rtol=1e-4)


HEADED = {
    "body": {"kernel": jnp.ones((2, 3))},
    "head": {"kernel": jnp.ones(3), "bias": jnp.ones(1)},
}
MAKERS = {
    "sgd": lambda: optimizers.sgd(0.5, tau=7.0),
    "momentum": lambda: optimizers.sgd(0.5, tau=7.0, momentum=0.9),
    "adam": lambda: optimizers.adam(0.1),
    "adam-cosine": lambda: optimizers.adam(0.1, schedule="cosine"),
    "adamw": lambda: optimizers.adamw(0.1, weight_decay=0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_head_only_is_the_optimizer_on_the_head_and_nothing_elsewhere(name):
    """The reference is a run of the head alone."""
    lopt = MAKERS[name]()
    tx = optimizers.head_only(lopt.apply({}, num_steps=5), lambda leaf: leaf.startswith("head/"))
    head_tx = lopt.apply({}, num_steps=5)
    params, head = HEADED, HEADED["head"]
    state, head_state = tx.init(params), head_tx.init(head)
    for k in range(3):
        grads = jax.tree.map(lambda p, k=k: jnp.sin(p + k), params)
        updates, state = tx.update(grads, state, params)
        expected, head_state = head_tx.update(grads["head"], head_state, head)
        params, head = (optax.apply_updates(p, u) for p, u in ((params, updates), (head, expected)))
    np.testing.assert_array_equal(params["body"]["kernel"], HEADED["body"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params["head"], head)
    assert not np.allclose(head["kernel"], 1.0)
    # The state covers the head only.
    assert optax.tree.size(state) == optax.tree.size(head_state)


def test_head_only_needs_a_head():
    tx = optimizers.head_only(optax.sgd(0.1), lambda name: name == "top")
    with pytest.raises(ValueError, match=r"none of the leaves \['body/kernel', 'head/bias'"):
        tx.init(HEADED)


def test_cosine_needs_its_horizon_and_a_known_name():
    with pytest.raises(ValueError, match="num_steps"):
        optimizers.adam(0.1, schedule="cosine").apply({})
    with pytest.raises(ValueError, match="'constant' or 'cosine'"):
        optimizers.adam(0.1, schedule="step").apply({})
