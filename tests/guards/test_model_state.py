"""Running statistics of BatchNorm belong to the point at which they were taken."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import assert_finite, assert_trees_equal, constant

from metaopt import guards
from metaopt.core.types import LearnedOptimizer


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


def rate_learned() -> LearnedOptimizer:
    """SGD whose rate is theta."""
    return LearnedOptimizer(
        init=lambda key, params: jnp.array(0.01),
        apply=lambda theta, num_steps=None: optax.sgd(theta),
        absorb=lambda theta, state: theta,
    )


def meta_window(kind, x, stats, rate, batches, n_t, lr_params, lr_theta):
    """One window of SMG or AMG by hand: what each candidate is, and its losses."""
    first, middle, second = batches[:n_t], batches[n_t], batches[n_t + 1 : 2 * n_t + 1]

    def descend(x, stats, rate, batches):
        for batch in batches:
            (_, stats), grad = jax.value_and_grad(loss_fn, has_aux=True)(x, stats, batch)
            x = jax.tree.map(lambda p, g: p - rate * g, x, jax.lax.stop_gradient(grad))
        return x, stats

    explored = descend(x, stats, rate, first)[1]
    end_loss = lambda x, rate: loss_fn(descend(x, stats, rate, first)[0], explored, middle)[0]
    value, (grad, grad_rate) = jax.value_and_grad(end_loss, (0, 1))(x, rate)
    learned = (*descend(x, stats, rate, first), rate)
    at_start, updated = loss_fn(x, stats, middle)
    used_gradient = kind == "amg" and at_start <= value
    if used_gradient:
        grad = jax.grad(lambda x: loss_fn(x, stats, middle)[0])(x)
    fallback = (
        jax.tree.map(lambda p, g: p - lr_params * g, x, grad),
        updated,
        rate if used_gradient else rate - lr_theta * grad_rate,
    )
    go_on = lambda x, stats, rate: (*descend(x, stats, rate, second), rate)
    candidates = [learned, fallback]
    judged = [go_on(*learned), go_on(*fallback)]
    if kind == "amg":
        judged = candidates = [learned, fallback, judged[1], (x, stats, rate)]
    losses = [
        np.mean([eval_fn(*point[:2], batch) for batch in batches[2 * n_t + 1 :]])
        for point in judged
    ]
    return candidates[int(np.argmin(losses))], losses


@pytest.mark.parametrize("in_a_stream", [True, False])
@pytest.mark.parametrize(
    "kind, rate, lr_params, winner",
    [
        ("smg", 0.01, 1e-3, 0),
        ("smg", 1e-3, 0.05, 1),
        ("amg", 0.05, 1e-3, 0),
        ("amg", 1e-3, 0.05, 1),
        ("amg", 0.01, 0.05, 2),
        ("amg", 1e-3, 1e-3, 3),
    ],
)
def test_the_model_state_of_a_meta_guard_belongs_to_the_pair_it_keeps(
    kind, rate, lr_params, winner, in_a_stream
):
    options = dict(n_t=3, lr_params=lr_params, lr_theta=1e-6)
    guard = getattr(guards, kind)(rate_learned(), jnp.array(rate), n_c=2, **options)
    if in_a_stream:
        trail = drive(guard)
        for _, state in trail[:-1]:  # the caller's params and their statistics wait
            assert_trees_equal(guards.model_state(state), STATS)
        params, state = trail[-1]
    else:
        tx = guards.in_windows(guard)
        updates, state = jax.jit(lambda state: tx.update(
            None, state, PARAMS, loss_fn=loss_fn, train_batches=BATCHES[:7],
            eval_batches=BATCHES[7:], eval_fn=eval_fn,
        ))(tx.init(PARAMS, STATS))  # fmt: skip
        params = optax.apply_updates(PARAMS, updates)
    kept, losses = meta_window(kind, PARAMS, STATS, jnp.array(rate), BATCHES, **options)
    assert state.info.winner == winner
    close(state.info.losses, losses)
    found = (params, guards.model_state(state), state.memory.theta)
    jax.tree.map(close, found, kept)
    assert state.info.loss_evals == {"smg": 2 * 2 + 1, "amg": 4 * 2 + 2}[kind]


@pytest.mark.parametrize("kind", ["smg", "amg"])
def test_a_meta_guard_takes_no_statistics_that_are_not_finite(kind):
    """NaN in a mini-batch of the first phase is NaN in the statistics of the learned pair."""
    guard = getattr(guards, kind)(rate_learned(), jnp.array(0.01), n_t=3, n_c=2, lr_params=0.01)
    params, state = drive(guard, BATCHES.at[1].set(jnp.nan))[-1]
    assert_finite((params, guards.model_state(state), state.memory.theta))
    assert state.info.losses[0] == jnp.inf


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
        guards.smg(rate_learned(), jnp.array(0.1)),
        guards.amg(rate_learned(), jnp.array(0.1)),
    ):
        state = guard.init(PARAMS, STATS)
        call = lambda value_fn, guard=guard, state=state: guard.update(
            None, state, PARAMS, value_fn=value_fn
        )
        with pytest.raises(ValueError, match=r"the loss must return \(loss, new_model_state\)"):
            call(lambda p, s: loss_fn(p, s, BATCHES[0])[0])
        with pytest.raises(ValueError, match=r"the loss returned: .*missing \['BatchNorm_0/mean"):
            call(lambda p, s: (loss_fn(p, s, BATCHES[0])[0], {}))
