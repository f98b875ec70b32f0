"""Running statistics of BatchNorm belong to the point at which they were taken."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import assert_finite, assert_trees_equal, constant

from metaopt import guards


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8)(
            nn.Dense(4, use_bias=False)(x)
        )
        return nn.Dense(1)(nn.relu(x))


NET = Net()
VARIABLES = NET.init(jax.random.key(0), jnp.zeros((1, 3)), train=True)
PARAMS, STATS = VARIABLES["params"], VARIABLES["batch_stats"]
BATCHES = 2.0 + jax.random.normal(jax.random.key(1), (9, 8, 3))
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def loss_fn(params, stats, batch):
    variables = {"params": params, "batch_stats": stats}
    out, new = NET.apply(variables, batch, train=True, mutable=["batch_stats"])
    return jnp.mean((out[:, 0] - jnp.sum(batch, 1)) ** 2), new["batch_stats"]


def eval_fn(params, stats, batch):
    out = NET.apply({"params": params, "batch_stats": stats}, batch, train=False)
    return jnp.mean((out[:, 0] - jnp.sum(batch, 1)) ** 2)


def plain(tx, params, stats, batches):
    """The loop that a user has without a guard."""
    state = tx.init(params)
    for batch in batches:
        (_, stats), grad = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, batch)
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, stats, state


def drive(guard, batches=BATCHES, op_by_op=False, with_eval_fn=True):
    """(params, state) after each mini-batch."""

    def call(params, state, batch):
        judge = {"eval_fn": lambda p, s: eval_fn(p, s, batch)} if with_eval_fn else {}
        updates, state = guard.update(
            None, state, params, value_fn=lambda p, s: loss_fn(p, s, batch), **judge
        )
        return optax.apply_updates(params, updates), state

    call, trail = call if op_by_op else jax.jit(call), []
    with jax.disable_jit(op_by_op):
        params, state = PARAMS, guard.init(PARAMS, STATS)
        for batch in batches:
            params, state = call(params, state, batch)
            trail.append((params, state))
    return trail


def test_a_fallback_of_a_race_is_bit_for_bit_the_plain_loop():
    guard = guards.race(optax.scale(3.0), optax.adam(0.1), n_t=2, patience=1, trial=1, budget=0.4)
    _, state = drive(guard, BATCHES[:6], op_by_op=True)[-1]
    with jax.disable_jit():
        z, stats, z_state = plain(optax.adam(0.1), PARAMS, STATS, BATCHES[:6])
    runner = state.work.value.runners[1]
    assert_trees_equal((runner.params, runner.model_state, runner.state), (z, stats, z_state))


@pytest.mark.parametrize("n_c", [0, 1])
def test_the_model_state_of_a_race_is_the_leaders(n_c):
    """It changes its lead at a decision and, where the challenger breaks, inside a window."""
    learned = optax.adam(lambda t: jnp.where(t < 4, 0.1, jnp.nan))
    guard = guards.race(learned, optax.sgd(1e-4), margin=0, n_t=3, n_c=n_c)
    leaders = []
    for params, state in drive(guard):
        points = state.work.value.runners
        nearest = [
            float(optax.tree.norm(optax.tree.sub(params, runner.params))) for runner in points
        ]
        leaders.append(int(np.argmin(nearest)))
        assert_trees_equal(guards.model_state(state), points[leaders[-1]].model_state)
    assert set(leaders) == {0, 1}
    assert np.any(points[0].model_state["BatchNorm_0"]["mean"]
                  != points[1].model_state["BatchNorm_0"]["mean"])  # fmt: skip


@pytest.mark.parametrize("use_eval_fn", [True, False])
@pytest.mark.parametrize("make", [guards.race, guards.lgl2o])
def test_eval_fn_decides_in_validation_phases(make, use_eval_fn):
    """With the statistics of each candidate; without it, the training loss decides."""
    guard = make(optax.adam(0.05), optax.sgd(0.01), n_t=2, n_c=1)
    _, state = drive(guard, BATCHES[:3], with_eval_fn=use_eval_fn)[-1]
    for tx, found in zip((optax.adam(0.05), optax.sgd(0.01)), state.info.losses, strict=True):
        z, stats, _ = plain(tx, PARAMS, STATS, BATCHES[:2])
        judge = eval_fn if use_eval_fn else lambda *arguments: loss_fn(*arguments)[0]
        close(found, judge(z, stats, BATCHES[2]))
    window_form = guards.in_windows(guard)
    _, other = window_form.update(
        None,
        window_form.init(PARAMS, STATS),
        PARAMS,
        loss_fn=loss_fn,
        train_batches=BATCHES[:2],
        eval_batches=BATCHES[2:3],
        eval_fn=eval_fn if use_eval_fn else None,
    )
    close(other.info.losses, state.info.losses)
    jax.tree.map(close, guards.model_state(other), guards.model_state(state))


@pytest.mark.parametrize("kept", ["learned", "fallback", "start"])
def test_lgl2o_rolls_the_model_state_back_with_the_point(kept):
    good, bad = optax.adam(0.05), constant(jnp.nan)
    pair = {"learned": (good, optax.sgd(0.0)), "fallback": (bad, good), "start": (bad, bad)}[kept]
    guard = guards.lgl2o(*pair, n_t=2, n_c=1)
    trail = drive(guard, BATCHES[:3])
    assert_trees_equal(guards.model_state(trail[1][1]), STATS)  # that of the caller's params
    params, state = trail[-1]
    assert state.info.winner == {"learned": 0, "fallback": 1, "start": -1}[kept]
    z, stats = (PARAMS, STATS) if kept == "start" else plain(good, PARAMS, STATS, BATCHES[:2])[:2]
    jax.tree.map(close, (params, guards.model_state(state)), (z, stats))


@pytest.mark.parametrize("learned", [optax.sgd(0.01), constant(jnp.nan)])
def test_the_model_state_of_gl2o_is_that_of_its_params(learned):
    """The loss at the caller's params updates it once per step; that at the proposal does not."""
    guard = guards.gl2o(learned, optax.sgd(0.01))
    trail = drive(guard, BATCHES[:4])
    points, stats = [PARAMS, *(params for params, _ in trail)], STATS
    for point, batch, (_, state) in zip(points, BATCHES, trail, strict=False):
        _, stats = loss_fn(point, stats, batch)
        jax.tree.map(close, guards.model_state(state), stats)


@pytest.mark.parametrize("make", [guards.gl2o, lambda *txs: guards.lgl2o(*txs, n_t=2, n_c=1)])
def test_a_broken_mini_batch_leaves_the_statistics_of_before(make):
    trail = drive(make(optax.sgd(0.01), optax.sgd(0.005)), BATCHES.at[3].set(jnp.nan))
    for params, state in trail:
        assert_finite((params, guards.model_state(state)))
    assert trail[-1][1].info.kept_start == 1 and trail[-1][1].info.wins.sum() >= 2


def test_mini_batches_that_break_the_statistics_are_skipped():
    """NaN in the inputs is NaN in the running mean, also where no gradient is."""
    batches = BATCHES.at[3].set(jnp.nan)
    guard = guards.race(optax.sgd(1e-4), optax.adam(0.05), n_t=3)
    params, state = drive(guard, batches)[-1]
    healthy = jnp.concatenate([batches[:3], batches[4:]])
    z, stats, _ = plain(optax.adam(0.05), PARAMS, STATS, healthy)
    runner = state.work.value.runners[1]
    jax.tree.map(close, (runner.params, runner.model_state), (z, stats))
    assert_finite((params, guards.model_state(state)))
    assert state.info.skipped == 2


def test_the_model_state_is_found_in_any_optimizer_state():
    guard = guards.race(optax.sgd(0.1), optax.sgd(0.2))
    state = guard.init(PARAMS, STATS)
    assert_trees_equal(guards.model_state((optax.EmptyState(), {"a": state})), STATS)
    for other in (guard.init(PARAMS), optax.adam(0.1).init(PARAMS)):
        with pytest.raises(ValueError, match="model_state: the state has no model state"):
            guards.model_state(other)


def test_losses_that_return_no_model_state_or_another():
    for guard in (
        guards.race(optax.sgd(0.1), optax.sgd(0.2)),
        guards.lgl2o(optax.sgd(0.1), optax.sgd(0.2)),
        guards.gl2o(optax.sgd(0.1), optax.sgd(0.2)),
    ):
        state = guard.init(PARAMS, STATS)
        call = lambda value_fn, guard=guard, state=state: guard.update(
            None, state, PARAMS, value_fn=value_fn
        )
        with pytest.raises(ValueError, match=r"the loss must return \(loss, new_model_state\)"):
            call(lambda p, s: loss_fn(p, s, BATCHES[0])[0])
        with pytest.raises(ValueError, match=r"the loss returned: .*missing \['BatchNorm_0/mean"):
            call(lambda p, s: (loss_fn(p, s, BATCHES[0])[0], {}))
