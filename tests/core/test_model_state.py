"""A loss with a model state in the one loop, against the loop that a Flax user writes."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import assert_trees_equal, constant
from stateful import assert_close, batchnorm_task, eval_loss, first_variables, plain_loop

import metaopt
from metaopt import guards
from metaopt.core.rollouts import unroll, unroll_sampled, windowed
from metaopt.core.types import Task
from metaopt.tasks import quadratic

KEY = jax.random.key(3)


def start(rate=0.0, number=9):
    """A task, params, model state and mini-batches."""
    task = batchnorm_task(rate)
    batches = task.sample(jax.random.key(1), (number,))
    return task, task.init(KEY), task.init_model_state(KEY), batches


@pytest.mark.parametrize("rate", [0.0, 0.4], ids=["batchnorm", "and dropout"])
@pytest.mark.parametrize("options", [{}, {"remat": True}, {"second_order": False}], ids=str)
def test_unroll_is_the_loop_that_users_write(rate, options):
    task, params, model_state, batches = start(rate)
    assert ("key" in batches) == (rate > 0)
    assert_trees_equal((params, model_state["batch_stats"]), first_variables(KEY, rate))
    tx = optax.adam(0.05)
    state = metaopt.init_state(tx, params, model_state)
    run = jax.jit(lambda p, s: unroll(tx, p, s, task.loss, batches, **options))
    new_params, state, losses = run(params, state)
    expected = plain_loop(tx, params, model_state["batch_stats"], batches, rate)
    stats = metaopt.model_state(state)["batch_stats"]
    assert_close((new_params, stats, losses), expected)
    whole = task.whole("test")
    held_out = task.eval_loss(new_params, {"batch_stats": stats}, whole)
    np.testing.assert_allclose(held_out, eval_loss(*expected[:2], whole, rate), rtol=1e-4)
    # In training mode, or with the first statistics, it is another number.
    assert abs(held_out - eval_loss(expected[0], model_state["batch_stats"], whole, rate)) > 1e-3


def test_the_number_of_steps_may_be_traced():
    task, params, model_state, batches = start()
    tx = optax.sgd(0.3)
    state = metaopt.init_state(tx, params, model_state)
    sample = lambda t: jax.tree.map(lambda leaf: leaf[t], batches)
    run = jax.jit(lambda n: unroll_sampled(tx, params, state, task.loss, sample, n))
    for n in (2, 9):
        part = jax.tree.map(lambda leaf, n=n: leaf[:n], batches)
        *expected, losses = plain_loop(tx, params, model_state["batch_stats"], part)
        found, new_state, mean = run(n)
        assert_close((found, metaopt.model_state(new_state)["batch_stats"]), tuple(expected))
        np.testing.assert_allclose(mean, losses.mean(), rtol=1e-5)
    assert run._cache_size() == 1


def test_a_window_is_its_steps():
    task, params, model_state, batches = start()
    tx = windowed(optax.sgd(0.3))
    state = tx.init(params, model_state)
    updates, state = tx.update(None, state, params, loss_fn=task.loss, train_batches=batches)
    expected = plain_loop(optax.sgd(0.3), params, model_state["batch_stats"], batches)
    found = optax.apply_updates(params, updates), metaopt.model_state(state)["batch_stats"]
    assert_close(found, expected[:2])


def test_a_race_whose_challenger_is_retired_ends_with_the_fallbacks_own_statistics():
    """Bit for bit, in unroll op by op."""
    task, params, model_state, batches = start(number=6)
    fallback = optax.adam(0.05)
    guard = guards.race(optax.scale(30.0), fallback, n_t=2, patience=1, margin=0)
    with jax.disable_jit():
        alone = unroll(
            fallback,
            params,
            metaopt.init_state(fallback, params, model_state),
            task.loss,
            batches,
        )
        raced = unroll(
            guard, params, metaopt.init_state(guard, params, model_state), task.loss, batches
        )
    assert raced[1].info.wins[0] < 3 and not raced[1].memory.runs  # it is retired at the end
    assert_trees_equal(metaopt.model_state(raced[1]), metaopt.model_state(alone[1]))
    assert_trees_equal(raced[0], alone[0])
    challenger, kept = (runner.model_state for runner in raced[1].work.value.runners)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), challenger, kept)))


@pytest.mark.parametrize(
    "make",
    [
        lambda *pair: guards.race(*pair, n_t=3),
        lambda *pair: guards.lgl2o(*pair, n_t=2, n_c=1),
        lambda *pair: guards.gl2o(*pair),
    ],
    ids=["race", "lgl2o", "gl2o"],
)
def test_a_guard_in_unroll_is_the_guard_in_a_loop(make):
    """Each of its optimizers has its own model state; the loop sees the leader's."""
    task, params, model_state, batches = start()
    guard = make(constant(jnp.nan), optax.sgd(0.3))
    x, state, _ = jax.jit(
        lambda p, s: unroll(guard, p, metaopt.init_state(guard, p, s), task.loss, batches)
    )(params, model_state)
    y, by_hand = params, guard.init(params, model_state)

    @jax.jit
    def call(y, state, batch):
        value_fn = lambda p, s: task.loss(p, s, batch)
        updates, state = guard.update(None, state, y, value_fn=value_fn)
        return optax.apply_updates(y, updates), state

    for index in range(9):
        y, by_hand = call(y, by_hand, jax.tree.map(lambda leaf, i=index: leaf[i], batches))
    assert_close(x, y)
    assert_close(metaopt.model_state(state), guards.model_state(by_hand))


def test_without_a_model_state_nothing_is_added():
    task, tx = quadratic(3), optax.adam(0.1)
    x = task.init(KEY)
    assert task.init_model_state(KEY) is None
    same = jax.tree.structure(metaopt.init_state(tx, x)) == jax.tree.structure(tx.init(x))
    assert same and jax.tree.structure(windowed(tx).init(x)) == jax.tree.structure(tx.init(x))
    assert task.eval_loss(x, task.whole()) == task.loss(x, task.whole())
    guard = guards.race(tx, tx)
    with pytest.raises(ValueError, match=r"model_state: the state has no model state"):
        metaopt.model_state(metaopt.init_state(guard, x))


def counted(new_state):
    """A task whose loss returns ``new_state(model_state)``."""
    return Task(
        init=lambda key: jnp.ones(2),
        loss=lambda x, seen, batch: (jnp.sum(x**2), new_state(seen)),
        sample=lambda key, shape, split="train": jnp.zeros(shape),
        whole=lambda split="test": jnp.zeros(()),
        init_model_state=lambda key: {"norm": {"mean": jnp.zeros(2), "count": 0}},
        eval_loss=lambda x, seen, batch: jnp.sum(x**2),
    )


WRONG = {
    "other leaves": (lambda s: {"norm": {"mean": s["norm"]["mean"]}}, r"missing \['norm/count'\]"),
    "shape": (
        lambda s: {"norm": {**s["norm"], "mean": jnp.zeros(3)}},
        r"leaf 'norm/mean' has shape \(3,\), expected \(2,\)",
    ),
    "dtype": (
        lambda s: {"norm": {**s["norm"], "mean": s["norm"]["mean"].astype(jnp.bfloat16)}},
        "leaf 'norm/mean' has dtype bfloat16, expected float32",
    ),
    "structure": (
        lambda s: {"norm": OrderedDict(s["norm"])},
        "the tree has the structure .*Ordered",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("make", [lambda tx: tx, lambda tx: guards.race(tx, tx)])
def test_a_model_state_that_changes_its_leaves_is_named(make, kind):
    new_state, message = WRONG[kind]
    task, tx = counted(new_state), make(optax.sgd(0.1))
    x = task.init(KEY)
    state = metaopt.init_state(tx, x, task.init_model_state(KEY))
    with pytest.raises(ValueError, match=f"the model state that the loss returned: .*{message}"):
        unroll(tx, x, state, task.loss, task.sample(KEY, (3,)))


def test_wrong_calls_say_what_to_do():
    task, tx = counted(lambda seen: seen), optax.sgd(0.1)
    x, batches = task.init(KEY), task.sample(KEY, (3,))
    with pytest.raises(ValueError, match=r"Task\.loss: .* metaopt\.init_state\(tx, params"):
        unroll(tx, x, tx.init(x), task.loss, batches)
    with pytest.raises(ValueError, match=r"Task\.loss: takes \(params, batch\), got 3 arguments"):
        plain = quadratic(2)
        unroll(tx, x, metaopt.init_state(tx, x, {"n": 0}), plain.loss, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"the loss must return \(loss, new_model_state\)"):
        loss_fn = lambda x, seen, batch: jnp.sum(x**2)
        unroll(tx, x, metaopt.init_state(tx, x, {"n": 0}), loss_fn, batches)
    with pytest.raises(ValueError, match="init_model_state is given without eval_loss"):
        task.replace(eval_loss=None)
