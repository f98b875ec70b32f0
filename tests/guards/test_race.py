"""The race: no challenger touches a fallback's run, and the caller holds the leader's point."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import (
    ADVERSARIES,
    FALLBACKS,
    USELESS,
    assert_finite,
    assert_trees_equal,
    constant,
    drive_steps,
    drive_stream,
    stream_of,
    whole_task,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from metaopt import guards
from metaopt.core.rollouts import unroll
from metaopt.datasets import digits
from metaopt.optimizers import lstm
from metaopt.tasks import classification, quadratic
from metaopt.tasks.networks import MLP

TASK = quadratic(5, noise=0.3)
START = TASK.init(jax.random.key(0))


@functools.cache
def plain_run(fallback: str, num_steps: int, seed: int = 1):
    """(params, state) of the run without a guard, a loop over all mini-batches, op by op."""
    tx = FALLBACKS[fallback]()
    with jax.disable_jit():
        batches = stream_of(TASK, num_steps, seed)
        return unroll(tx, START, tx.init(START), TASK.loss, batches)[:2]


def compiled(guard, loss, x, batches):
    """States ``[T]`` and params ``[T]`` after each mini-batch, in one program."""

    @jax.jit
    def run(x, batches):
        def body(carry, batch):
            updates, state = guard.update(
                None, carry[1], carry[0], value_fn=lambda p: loss(p, batch)
            )
            carry = (optax.apply_updates(carry[0], updates), state)
            return carry, carry

        return jax.lax.scan(body, (x, guard.init(x)), batches)[1]

    return run(x, batches)


################################################################################
# The fallbacks' runs
################################################################################


@pytest.mark.parametrize("learned", ADVERSARIES)
def test_every_fallbacks_run_is_bit_for_bit_the_run_without_a_guard(learned):
    """On all mini-batches, while the challenger is retired and starts again."""
    fallbacks = [make() for make in FALLBACKS.values()]
    guard = guards.race(ADVERSARIES[learned](), *fallbacks, n_t=2, patience=1, trial=1, budget=0.4)
    x, state = drive_stream(guard, TASK, START, 5)[-1]
    for name, runner in zip(FALLBACKS, state.work.value.runners[1:], strict=True):
        z, z_state = plain_run(name, 10)
        np.testing.assert_array_equal(runner.params, z)
        assert_trees_equal(runner.state, z_state)
    assert_finite(x)


@settings(max_examples=8, derandomize=True, deadline=None, phases=[Phase.generate])
@given(
    learned=st.sampled_from(sorted(ADVERSARIES)),
    names=st.lists(st.sampled_from(sorted(FALLBACKS)), min_size=1, max_size=2),
    n_t=st.integers(1, 3),
    smoothing=st.sampled_from([0.0, 0.5, 0.9]),
    patience=st.integers(1, 3),
    budget=st.sampled_from([0.0, 0.4, 1.0]),
    memory=st.sampled_from(["carry", "reset"]),
    seed=st.integers(0, 3),
)
def test_the_fallbacks_runs_whatever_the_options(
    learned, names, n_t, smoothing, patience, budget, memory, seed
):
    guard = guards.race(
        ADVERSARIES[learned](),
        *[FALLBACKS[name]() for name in names],
        n_t=n_t,
        smoothing=smoothing,
        patience=patience,
        trial=patience,
        budget=budget,
        memory=memory,
    )
    x, state = drive_steps(guard, TASK, START, 6, seed=seed)[-1]
    for name, runner in zip(names, state.work.value.runners[1:], strict=True):
        z, z_state = plain_run(name, 6, seed)
        np.testing.assert_array_equal(runner.params, z)
        assert_trees_equal(runner.state, z_state)
    assert_finite((x, [runner.params for runner in state.work.value.runners]))


@pytest.mark.parametrize("value", USELESS)
def test_useless_challengers_leave_the_caller_the_fallbacks_run(value):
    guard = guards.race(ADVERSARIES[value](), FALLBACKS["momentum"](), n_t=2)
    trail = drive_steps(guard, TASK, START, 8)
    for x, state in trail:
        np.testing.assert_allclose(x, state.work.value.runners[1].params, rtol=1e-6, atol=1e-7)
    assert state.info.winner == 1 and state.info.wins.tolist() == [0, 4]


################################################################################
# The decisions
################################################################################

CURVATURE = np.array([1.0, 0.3, 0.1])


def poisoned(params, batch):
    """A quadratic around the mini-batch, times its last entry: 1, or what breaks it."""
    return (
        batch[-1] * 0.5 * jnp.sum(jnp.asarray(CURVATURE, params.dtype) * (params - batch[:-1]) ** 2)
    )


def poisoned_batches(num_steps: int, share=0.0, poison=np.nan, seed: int = 0, scale=0.4):
    rng = np.random.default_rng(seed)
    noise = scale * rng.standard_normal((num_steps, 3))
    factor = np.where(rng.random((num_steps, 1)) < share, poison, 1.0)
    return np.concatenate([noise, factor], axis=1).astype(np.float32)


def good_harmful_nan(t):
    """Rates of a challenger: good, harmful, good, NaN, good."""
    return jnp.where(t < 20, 0.5, jnp.where(t < 45, -0.4, jnp.where(t == 80, jnp.nan, 0.3)))


RATES = (good_harmful_nan, 0.02, 0.1)
MOMENTA = (0.5, 0.0, 0.8)


class SGDByHand:
    """A runner in float64."""

    def __init__(self, index: int, params):
        self.rate, self.momentum = RATES[index], MOMENTA[index]
        self.params, self.trace, self.count = params, np.zeros(3), 0

    def loss(self, batch) -> float:
        return batch[-1] * 0.5 * np.sum(CURVATURE * (self.params - batch[:-1]) ** 2)

    def step(self, batch) -> bool:
        """Takes the step if it stays finite; returns whether it did."""
        rate = float(self.rate(self.count)) if callable(self.rate) else self.rate
        trace = self.momentum * self.trace + batch[-1] * CURVATURE * (self.params - batch[:-1])
        params = self.params - rate * trace
        if not np.all(np.isfinite(params)):
            return False
        self.params, self.trace, self.count = params, trace, self.count + 1
        return True


def race_by_hand(batches, *, n_t, n_c, smoothing, margin, patience, trial, budget, memory):
    """The rule in words, in float64; yields what must hold after each window.

    The challenger takes the lead by `margin` standard errors of the averages' difference, and keeps
    it while its average is the lower one. It is retired after `patience` windows in which it is
    behind by the same margin, after a window in which it broke, or when another window without the
    lead would be more than `trial` and the share `budget` of all windows. Then `trial` is used up,
    and it goes on from the best fallback's point when the share pays for `patience` windows. With a
    budget of 1 nothing is counted. An average that is infinite starts again from the next mean.
    A window of which no loss is finite changes no standing.
    """
    runners = [SGDByHand(i, np.full(3, 3.0)) for i in range(3)]
    average, leader, lost, runs, missed, spent = [np.inf] * 3, 1, 0, True, 0, 0
    variance = np.zeros(2)  # of the difference to each fallback
    gradients = losses = skipped = 0
    restart = spoilt = False
    size = n_t + n_c
    for w in range(len(batches) // size):
        window = batches[w * size : (w + 1) * size].astype(float)
        running = [i for i in range(3) if i or runs]
        if restart:
            best = 1 + int(np.argmin(average[1:]))
            runners[0].params = runners[best].params
            runners[0].count += missed
            if memory == "reset" or spoilt:
                runners[0].trace = np.zeros(3)
            missed, restart = 0, False
        rows, broke = [], False
        for index, batch in enumerate(window):
            row = np.full(3, np.inf)
            row[running] = [runners[i].loss(batch) for i in running]
            if index < n_t:
                taken = {i: runners[i].step(batch) for i in running}
                skipped += sum(not t for t in taken.values())
                fine = {i: t and np.isfinite(row[i]) for i, t in taken.items()}
                broke |= 0 in fine and not fine[0] and (fine[1] or fine[2])
            if (index >= n_t or not n_c) and np.any(np.isfinite(row)):
                rows.append(np.where(np.isfinite(row), row, np.inf))
        gradients, losses = gradients + len(running) * n_t, losses + len(running) * n_c
        was_running = runs
        spent += runs and leader > 0
        # Within rounding: a share of 0.1 of 30 windows pays for 3.
        paid = np.inf if budget == 1 else trial + budget * (w + 2) + 1e-5
        ahead = leader == 0 and not broke  # unless the window decides
        if rows:
            means = np.mean(rows, axis=0)
            if broke or not was_running:
                means[0] = np.inf
            differences = np.array([row[0] - row[1:] for row in rows])
            differences = np.where(np.isfinite(differences), differences, 0.0)
            error = differences.var(axis=0) / max(len(rows) - 1, 1)
            if np.isfinite(average[0]):
                error = smoothing**2 * variance + (1 - smoothing) ** 2 * error
            variance = error if was_running and not broke else np.zeros(2)
            average = [
                smoothing * old + (1 - smoothing) * new if np.isfinite(old) else new
                for old, new in zip(average, means, strict=True)
            ]
            best = 1 + int(np.argmin(average[1:]))
            has_lead = leader == 0 and not broke
            error = margin * np.sqrt(variance[best - 1])
            ahead = average[0] < average[best] - (0.0 if has_lead else error)
            behind = was_running and average[0] >= average[best] + error
            leader, lost = (0, 0) if ahead else (best, lost + behind)
        if was_running and (lost >= patience or broke or not (ahead or spent + 1 <= paid)):
            runs, lost, spoilt, spent = False, 0, broke, max(spent, trial)
        if not runs and spent + patience <= paid:
            runs = restart = True
        if not was_running:
            missed += n_t
        if restart:
            average[0], variance, lost = min(average[1:]), np.zeros(2), 0
        yield dict(
            leader=leader,
            runs=runs,
            gradient_evals=gradients,
            loss_evals=losses,
            skipped=skipped,
            point=runners[leader].params,
            points=[r.params for r in runners[1:]],
        )


@pytest.mark.parametrize(
    ("share", "options"),
    [
        (0.0, {}),  # the defaults
        # Starts again after each lost window.
        (0.0, dict(n_t=2, smoothing=0.0, margin=0.0, patience=1, budget=1)),
        (
            0.1,
            dict(n_t=3, smoothing=0.8, margin=1.7, patience=2, trial=4, budget=0.3, memory="reset"),
        ),
        (0.2, dict(n_t=1, smoothing=0.5, patience=4, budget=1)),
        # The trial ends before patience does.
        (0.1, dict(n_t=2, smoothing=0.5, margin=4.0, patience=3, trial=2, budget=0.13)),
        (
            0.1,
            dict(n_t=3, n_c=2, smoothing=0.3, margin=0.5, patience=1, budget=0.25, memory="reset"),
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_decisions_are_those_of_the_rule_written_anew(share, options, seed):
    defaults = dict(
        n_t=10,
        n_c=0,
        smoothing=0.5,
        margin=2.0,
        patience=12,
        trial=20,
        budget=0.05,
        memory="carry",
    )
    txs = [
        optax.sgd(rate, momentum=momentum or None)
        for rate, momentum in zip(RATES, MOMENTA, strict=True)
    ]
    guard = guards.race(*txs, **options)
    given = {**defaults, **options}
    assert guard.window == (given["n_t"], given["n_c"])
    size = sum(guard.window)
    batches = poisoned_batches(240 // size * size, share, seed=seed)
    trail = compiled(guard, poisoned, jnp.full(3, 3.0), jnp.asarray(batches))
    params, states = jax.device_get(trail)
    found = []
    for w, expected in enumerate(race_by_hand(batches, **given)):
        state = jax.tree.map(lambda leaf, i=(w + 1) * size - 1: leaf[i], states)
        for name in ("leader", "runs"):
            assert getattr(state.memory, name) == expected[name], (w, name)
        for name in ("gradient_evals", "loss_evals", "skipped"):
            assert getattr(state.info, name) == expected[name], (w, name)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
        close(params[(w + 1) * size - 1], expected["point"])
        for runner, point in zip(state.work.value.runners[1:], expected["points"], strict=True):
            close(runner.params, point)
        found.append(expected)
    assert {f["leader"] for f in found} >= {0, 2}
    starts_again = any(not a["runs"] and b["runs"] for a, b in itertools.pairwise(found))
    if not options:
        assert not found[-1]["runs"]
    elif options["budget"] < 1:  # else it is retired and starts again in the same decision
        assert starts_again


@pytest.mark.parametrize("learned", ADVERSARIES)
def test_on_full_batches_the_leader_is_never_worse_than_a_fallback(learned):
    """F of the leader before its last step, and so the fallback's rate one step behind."""
    condition, lr = 5.0, 0.7
    task = whole_task(condition=condition)
    energy = lambda x: float(task.loss(x, jnp.zeros(5)))
    start = task.init(jax.random.key(0))
    rate = 1 - 2 / condition * lr * (1 - lr / 2)
    guard = guards.race(
        ADVERSARIES[learned](), optax.sgd(lr), n_t=1, smoothing=0, trial=1, budget=0.4
    )
    before = [start, start]
    for k, (_, state) in enumerate(drive_steps(guard, task, start, 8)):
        leader, runs = (
            int(state.memory.leader),
            [0, 1] if np.isfinite(state.info.losses[0]) else [1],
        )
        if not state.memory.restart and runs == [0, 1] and k == 0:
            np.testing.assert_allclose(state.info.losses[1], energy(start), rtol=1e-5)
        slack = 1e-5 * energy(before[1]) + 1e-10
        led = float(state.info.losses[leader])
        assert led <= energy(before[1]) + slack
        assert led <= rate**k * energy(start) * (1 + 1e-5) + 1e-10
        before = [runner.params for runner in state.work.value.runners]


def test_ties_go_to_a_fallback_and_to_the_first():
    guard = guards.race(FALLBACKS["adam"](), FALLBACKS["adam"](), FALLBACKS["adam"](), n_t=2)
    for _, state in drive_stream(guard, TASK, jnp.ones(5), 3):
        assert state.info.winner == 1 and not state.info.accepted


def test_three_runners_take_turns():
    """The first fallback is fast, then explodes; the second is slow and stable."""
    wild = optax.sgd(lambda t: jnp.where(t < 6, 0.5, 30.0))
    guard = guards.race(constant(float("nan")), wild, optax.sgd(0.1), n_t=3, smoothing=0)
    trail = drive_stream(guard, TASK, jnp.full(5, 3.0), 5)
    assert [int(s.info.winner) for _, s in trail] == [1, 1, 2, 2, 2]


def test_a_challenger_that_is_never_retired_runs_as_if_alone():
    guard = guards.race(optax.adam(0.1), optax.sgd(0.0), n_t=3, margin=0)
    trail = drive_steps(guard, TASK, jnp.full(5, 3.0), 9)
    alone = drive_steps(optax.adam(0.1), TASK, jnp.full(5, 3.0), 9)
    for i, ((x, state), (y, y_state)) in enumerate(zip(trail, alone, strict=True), start=1):
        challenger = state.work.value.runners[0]
        np.testing.assert_array_equal(challenger.params, y)
        assert_trees_equal(challenger.state, y_state)
        if i >= 3:  # since the first decision it leads, and the caller's params follow
            np.testing.assert_allclose(x, y, rtol=1e-6)
    assert state.info.wins.tolist() == [3, 0] and state.info.accepted


@pytest.mark.parametrize("n_c", [0, 2])
def test_the_callers_params_follow_the_leaders_point(n_c):
    """Exactly, where the difference of both points has no rounding; else to the last bit."""
    guard = guards.race(optax.sgd(0.3), FALLBACKS["adam"](), n_t=3, n_c=n_c, margin=0)
    start, exact = jnp.full(5, 3.0), 0
    before = start
    for x, state in drive_steps(guard, TASK, start, 15):
        leader = int(state.memory.leader)
        point = np.asarray(state.work.value.runners[leader].params)
        is_near = (np.abs(point) <= 2 * np.abs(before)) & (np.abs(before) <= 2 * np.abs(point))
        is_near &= np.sign(point) == np.sign(before)
        np.testing.assert_array_equal(np.asarray(x)[is_near], point[is_near])
        assert np.all(np.abs(x - point) <= 2e-7 * np.maximum(np.abs(before), np.abs(point)))
        exact, before = exact + is_near.sum(), np.asarray(x)
    assert exact > 30
    np.testing.assert_allclose(optax.tree.get(state, "leader_loss"), state.work.value.leader_loss)


def test_the_state_holds_the_leaders_loss_on_the_last_mini_batch_before_its_step():
    guard = guards.race(optax.sgd(0.3), optax.sgd(0.1), n_t=3)
    batches, before = stream_of(TASK, 7), (START, guard.init(START))
    for batch, (x, state) in zip(batches, drive_steps(guard, TASK, START, 7), strict=True):
        leader = int(before[1].memory.leader)
        expected = TASK.loss(before[1].work.value.runners[leader].params, batch)
        np.testing.assert_allclose(state.work.value.leader_loss, expected, rtol=1e-5)
        before = (x, state)


def test_held_out_losses_decide_without_costing_mini_batches():
    """The challenger is better on the training losses and worse on the held-out ones."""
    held_out = lambda params: -TASK.loss(params, jnp.zeros(5))
    challenger, fallback = optax.sgd(0.3), optax.sgd(0.05)
    batches = stream_of(TASK, 12)

    def run(**given):
        guard = guards.race(challenger, fallback, n_t=3, margin=0, patience=9)
        x, state = START, guard.init(START)
        for batch in batches:
            value_fn = lambda p, batch=batch: TASK.loss(p, batch)
            updates, state = guard.update(None, state, x, value_fn=value_fn, **given)
            x = optax.apply_updates(x, updates)
        return x, state

    _, by_training = run()
    x, state = run(eval_fn=held_out)
    assert by_training.info.wins.tolist() == [4, 0] and by_training.info.loss_evals == 0
    assert state.info.wins.tolist() == [0, 4] and state.info.loss_evals == 2 * 12
    expected, losses = START, []
    for batch in batches:
        expected = expected - 0.05 * jax.grad(TASK.loss)(expected, batch)
        losses.append(held_out(expected))
    np.testing.assert_allclose(x, expected, rtol=1e-5)
    np.testing.assert_allclose(state.info.losses[1], np.mean(losses[-3:]), rtol=1e-5)


@pytest.mark.parametrize("parts", [False, True])
def test_once_per_window_the_points_that_the_caller_may_get_are_judged(parts):
    """Without smoothing and margin the caller gets the better of them."""
    target = jnp.arange(5.0)
    held_out = lambda params: 0.5 * jnp.square(params - target)
    eval_fn = held_out if parts else lambda params: jnp.mean(held_out(params))
    options = dict(n_t=3, eval_every=3, smoothing=0.0, margin=0.0)
    guard = guards.race(optax.sgd(0.3), optax.sgd(0.05), **options)
    x, state, winners = START, guard.init(START), []
    for step, batch in enumerate(stream_of(TASK, 12), start=1):
        value_fn = lambda p, batch=batch: TASK.loss(p, batch)
        updates, state = guard.update(None, state, x, value_fn=value_fn, eval_fn=eval_fn)
        x = optax.apply_updates(x, updates)
        if step % 3 == 0:
            losses = [jnp.mean(held_out(r.params)) for r in state.work.value.runners]
            np.testing.assert_allclose(state.info.losses, losses, rtol=1e-6)
            np.testing.assert_allclose(jnp.mean(held_out(x)), min(losses), rtol=1e-6)
            assert state.info.loss_evals == 2 * step / 3
            winners.append(int(state.info.winner))
    assert set(winners) == {0, 1}


@pytest.mark.parametrize("training_says", [0, 1])
@pytest.mark.parametrize("held_out_says", [0, 1])
@pytest.mark.parametrize("overrule", [0.0, 1.9, 2.1, 1e9])
def test_held_out_losses_overrule_training_losses_by_their_standard_error(
    training_says, held_out_says, overrule
):
    """The challenger moves by 1 per step, the fallback stays: all differences are known."""
    num_parts, ratio = 16, 2.0  # the mean difference in standard errors
    noise = np.tile([1.0, -1.0], num_parts // 2)
    error = noise.std() / np.sqrt(num_parts - 1)
    slopes = noise + (1 if held_out_says else -1) * ratio * error
    guard = guards.race(
        constant(1.0), optax.set_to_zero(), n_t=2, eval_every=2, overrule=overrule, margin=0.0
    )
    x, state = jnp.zeros(1), guard.init(jnp.zeros(1))
    for _ in range(8):
        updates, state = guard.update(
            None,
            state,
            x,
            value_fn=lambda p: (1.0 if training_says else -1.0) * p[0],
            eval_fn=lambda p: p[0] * jnp.asarray(slopes, jnp.float32),
        )
        x = optax.apply_updates(x, updates)
    expected = held_out_says if overrule < ratio else training_says
    assert state.info.winner == expected and state.info.wins[expected] == 4
    assert state.memory.lost == (4 if expected else 0)
    assert state.info.loss_evals == 2 * 4


def test_without_eval_fn_overrule_has_no_effect():
    runs = [
        drive_steps(
            guards.race(optax.sgd(0.3), optax.adam(0.1), n_t=2, overrule=overrule), TASK, START, 8
        )
        for overrule in (0.0, 1.0)
    ]
    for (x, state), (y, other) in zip(*runs, strict=True):
        np.testing.assert_array_equal(x, y)
        assert_trees_equal(state.memory, other.memory)


################################################################################
# Costs
################################################################################


@pytest.mark.parametrize("n_c", [0, 2])
def test_gradients_and_losses_are_counted_as_they_are_computed(n_c):
    """Op by op no branch runs that is not taken."""
    calls = {"train": 0, "judge": 0}

    def counted(kind, batch):
        def value_fn(params):
            calls[kind] += 1
            return TASK.loss(params, batch)

        return value_fn

    guard = guards.race(
        optax.scale(3.0),
        optax.sgd(0.1),
        optax.sgd(0.2),
        n_t=2,
        n_c=n_c,
        patience=1,
        trial=1,
        budget=0.4,
    )
    size, x = 2 + n_c, START
    with jax.disable_jit():
        state = guard.init(x)
        for i, batch in enumerate(stream_of(TASK, 5 * size), start=1):
            updates, state = guard.update(
                None, state, x, value_fn=counted("train", batch), eval_fn=counted("judge", batch)
            )
            x = optax.apply_updates(x, updates)
            if i % size == 0:
                assert state.info.gradient_evals == calls["train"]
                assert state.info.loss_evals == calls["judge"]
    assert 2 * 2 * 5 < calls["train"] < 3 * 2 * 5
    assert calls["judge"] > 0  # with n_c=0 after each step


@pytest.mark.parametrize("learned", ["nan", "1e30", "ascent", "random"])
def test_a_useless_challenger_costs_a_tenth_of_the_fallbacks_gradients(learned):
    guard = guards.race(ADVERSARIES[learned](), optax.sgd(0.1))
    loss = lambda p, batch: 0.5 * jnp.sum((p - batch) ** 2)
    batches = 0.3 * jax.random.normal(jax.random.key(0), (2000, 3))
    counts = []
    counted = lambda p, batch: (jax.debug.callback(lambda: counts.append(1)), loss(p, batch))[1]
    _, states = compiled(guard, counted, jnp.ones(3), batches)
    jax.effects_barrier()
    assert states.info.gradient_evals[-1] == len(counts) <= 1.1 * 2000
    assert states.info.wins[-1].tolist()[0] <= 2


@pytest.mark.parametrize(("trial", "budget"), [(20, 0.05), (3, 0.1), (5, 0.0)])
@pytest.mark.parametrize("learned", ["ascent", "random", "late", "same"])
def test_windows_without_the_lead_are_bounded(learned, trial, budget):
    """At most ``trial + budget * m`` after m windows, also where the sides are equal."""
    fallback = optax.sgd(0.1)
    others = {"same": fallback, "late": optax.sgd(lambda t: jnp.where(t < 100, 0.3, -0.1))}
    challenger = others[learned] if learned in others else ADVERSARIES[learned]()
    guard = guards.race(challenger, fallback, n_t=2, trial=trial, budget=budget)
    loss = lambda p, batch: 0.5 * jnp.sum((p - batch) ** 2)
    batches = 0.3 * jax.random.normal(jax.random.key(0), (800, 3))
    _, states = compiled(guard, loss, jnp.ones(3), batches)
    leaders, runs = (np.asarray(v[1::2]) for v in (states.memory.leader, states.memory.runs))
    begun = np.concatenate([[True], (leaders != 0) & runs])[:-1]
    windows = np.arange(1, 401)
    assert np.all(np.cumsum(begun) <= trial + budget * windows + 1e-4)
    assert begun.sum() >= (trial if learned == "same" else 1)
    expected = 800 + 2 * np.sum(np.concatenate([[True], runs])[:-1])
    assert states.info.gradient_evals[-1] == expected


def test_a_challenger_with_a_slow_start_is_not_retired():
    """It is behind in the first windows, and ahead on its own trajectory later."""
    slow = optax.sgd(lambda t: jnp.where(t < 40, 0.0, 0.3))
    guard = guards.race(slow, optax.sgd(0.02))
    loss = lambda p, batch: 0.5 * jnp.sum((p - batch) ** 2)
    batches = 0.3 * jax.random.normal(jax.random.key(0), (200, 3))
    _, states = compiled(guard, loss, jnp.full(3, 5.0), batches)
    assert states.memory.leader[39] == 1 and states.memory.leader[-1] == 0
    assert np.all(states.memory.runs)
    assert optax.tree.get(states.work.value.runners[0].state, "count")[-1] == 200


def test_a_good_challenger_costs_one_more_gradient():
    guard = guards.race(optax.sgd(0.3), optax.sgd(0.001))
    loss = lambda p, batch: 0.5 * jnp.sum((p - batch) ** 2)
    batches = 0.3 * jax.random.normal(jax.random.key(0), (300, 3))
    _, states = compiled(guard, loss, jnp.full(3, 5.0), batches)
    assert states.info.gradient_evals[-1] == 2 * 300
    assert states.info.wins[-1].tolist() == [30, 0]


################################################################################
# Mini-batches that are not finite
################################################################################


def nan_in_a_gradient(params, batch):
    """The loss is finite, but a poisoned mini-batch has a gradient of NaN in the first leaf."""
    is_bad = ~jnp.isfinite(batch[-1])
    zero = jnp.where(is_bad, 0.0, 1.0)
    rest = 0.5 * jnp.sum(jnp.asarray(CURVATURE, params.dtype) * (params - batch[:-1]) ** 2)
    return rest + 0.0 * jnp.sqrt(zero * jnp.abs(params[0]))


@pytest.mark.parametrize("n_c", [0, 2])
@pytest.mark.parametrize(
    ("loss", "poison"),
    [(poisoned, np.nan), (poisoned, np.inf), (nan_in_a_gradient, np.nan)],
    ids=["nan", "inf", "gradient"],
)
@pytest.mark.parametrize("share", ["one", "many"])
def test_mini_batches_that_are_not_finite_disarm_nothing(loss, poison, share, n_c):
    """An ascending challenger never wins, and the fallback goes on without them."""
    batches = poisoned_batches(400, 0.05 if share == "many" else 0.0, poison, scale=0.0)
    if share == "one":
        batches[2, -1] = poison
    is_bad = ~np.isfinite(batches[:, -1])
    fallback = optax.sgd(0.05, momentum=0.5)
    guard = guards.race(optax.sgd(-0.02), fallback, n_t=5, n_c=n_c)
    start = jnp.full(3, 3.0)
    params, states = compiled(guard, loss, start, jnp.asarray(batches))
    assert_finite((params, states.work.value.runners))
    is_training = np.arange(400) % (5 + n_c) < 5
    z = start
    healthy = jnp.asarray(batches[is_training & ~is_bad])
    z, _, _ = jax.jit(lambda z: unroll(fallback, z, fallback.init(z), poisoned, healthy))(z)
    runner = jax.tree.map(lambda leaf: leaf[-1], states.work.value.runners[1])
    np.testing.assert_allclose(runner.params, z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params[-1], z, rtol=1e-4, atol=1e-5)
    decided = 400 // (5 + n_c) * (5 + n_c)
    skipped = is_bad[:decided] & is_training[:decided]
    assert skipped.sum() <= states.info.skipped[-1] <= 2 * skipped.sum()
    assert states.info.wins[-1, 0] == 0


def test_a_window_without_a_finite_loss_changes_no_standing():
    """With windows of one mini-batch, NaN would otherwise hand the lead to the first fallback."""
    guard = guards.race(optax.sgd(0.0), optax.sgd(0.0), optax.sgd(0.3), n_t=1, patience=2)
    batches = poisoned_batches(12)
    batches[6:9, -1] = np.nan
    params, states = compiled(guard, poisoned, jnp.full(3, 3.0), jnp.asarray(batches))
    assert states.memory.leader[2:].tolist() == [2] * 10
    assert states.info.winner.tolist()[6:9] == [-1] * 3 and states.info.kept_start[-1] == 3
    np.testing.assert_array_equal(params[8], params[5])


def test_no_finite_step_keeps_the_start_and_counts_it():
    guard = guards.race(constant(float("nan")), constant(float("inf")), n_t=2, patience=9)
    for w, (x, state) in enumerate(drive_stream(guard, TASK, START, 3), start=1):
        np.testing.assert_array_equal(x, START)
        assert state.info.winner == 1  # at the start, whose loss is finite
        assert state.info.skipped == 4 * w


def test_a_fallback_that_diverges_does_not_take_the_challenger_with_it():
    guard = guards.race(optax.sgd(0.1), constant(1e25), n_t=2, patience=1)
    for w, (x, state) in enumerate(drive_stream(guard, TASK, jnp.ones(5), 4)):
        assert state.info.winner == 0 or w == 0
        assert_finite((x, [runner.params for runner in state.work.value.runners]))


def test_a_leading_challenger_that_breaks_loses_its_lead_at_once():
    """Inside of a window. Where only its next loss shows it, one mini-batch later."""
    for rate, first in ((jnp.nan, 8), (1e30, 10)):
        learned = optax.sgd(lambda t, rate=rate: jnp.where(t < 8, 0.5, rate))
        guard = guards.race(learned, optax.sgd(0.01), n_t=5)
        trail = drive_steps(guard, TASK, jnp.full(5, 3.0), 14)
        assert trail[7][1].memory.leader == 0
        for x, state in trail[first:]:
            np.testing.assert_allclose(x, state.work.value.runners[1].params, rtol=1e-6)
        assert not trail[9][1].memory.runs


################################################################################
# Memory of the challenger
################################################################################


@pytest.mark.parametrize("memory", ["carry", "reset"])
def test_memory_and_step_counts_when_a_challenger_starts_again(memory):
    learned = optax.chain(optax.trace(0.5), optax.scale_by_learning_rate(lambda t: -1.0 - 0 * t))
    guard = guards.race(
        learned, optax.sgd(0.1), n_t=2, patience=1, trial=1, budget=0.3, memory=memory
    )
    trail = [state for _, state in drive_steps(guard, TASK, START, 9)]
    assert [bool(s.memory.runs) for s in trail[1::2]] == [False, False, True, False]
    challenger = [state.work.value.runners[0] for state in trail]
    get = optax.tree.get
    assert_trees_equal(challenger[1], challenger[5])  # it stands while it waits
    assert [int(get(c.state, "count")) for c in challenger] == [1, 2, 2, 2, 2, 2, 7, 8, 8]
    point = trail[5].work.value.runners[1].params
    with jax.disable_jit():
        grad = jax.grad(TASK.loss)(point, stream_of(TASK, 9)[6])
        old = get(challenger[5].state, "trace") if memory == "carry" else jnp.zeros(5)
        np.testing.assert_allclose(get(challenger[6].state, "trace"), grad + 0.5 * old, rtol=1e-6)
    np.testing.assert_allclose(challenger[6].params, point + grad + 0.5 * old, rtol=1e-5)


def test_a_memory_that_turned_nan_starts_afresh():
    guard = guards.race(
        ADVERSARIES["nan_memory"](), optax.sgd(0.5), n_t=1, patience=1, trial=1, budget=0.4
    )
    trail = drive_steps(guard, whole_task(), jnp.ones(5), 8)
    assert any(np.isnan(s.work.value.runners[0].state["memory"]).any() for _, s in trail)
    assert all(np.isfinite(x).all() for x, _ in trail)


def test_errors():
    with pytest.raises(ValueError, match="at least one fallback"):
        guards.race(optax.sgd(0.1))
    for options, message in (
        ({"memory": "keep"}, "memory must be"),
        ({"n_t": 0}, "n_t must be at least 1, got 0"),
        ({"smoothing": 1.0}, r"smoothing must be"),
        ({"trial": 0}, "trial must be at least 1, got 0"),
        ({"budget": 1.5}, "budget must be"),
        ({"n_t": 6, "eval_every": 4}, "eval_every must be a divisor of n_t=6"),
        ({"n_c": 1, "eval_every": 2}, "eval_every must be .* got 2 with n_c=1"),
        ({"overrule": -1.0}, "overrule must not be negative"),
        ({"n_c": 1, "overrule": 1.0}, "overrule needs n_c=0"),
    ):
        with pytest.raises(ValueError, match=f"race: {message}"):
            guards.race(optax.sgd(0.1), optax.sgd(0.1), **options)


def test_an_lstm_on_a_network_as_a_compiled_stream():
    """Params in a tree, real data: the fallback's run is that of the fallback alone."""
    task = classification(MLP((4, 10)), digits(), batch_size=16)
    x = task.init(jax.random.key(0))
    family = lstm(2)
    theta = family.init(jax.random.key(1), x)
    guard = guards.race(family.apply(theta), optax.sgd(0.1, momentum=0.9), n_t=3)
    batches = task.sample(jax.random.key(2), (12,))
    kept, state = jax.jit(lambda x: unroll(guard, x, guard.init(x), task.loss, batches)[:2])(x)
    plain = optax.sgd(0.1, momentum=0.9)
    z, _, _ = jax.jit(lambda x: unroll(plain, x, plain.init(x), task.loss, batches))(x)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    runners = state.work.value.runners
    jax.tree.map(close, runners[1].params, z)
    jax.tree.map(close, kept, runners[int(state.memory.leader)].params)
