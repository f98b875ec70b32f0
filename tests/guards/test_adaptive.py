"""Sizes of windows that grow, and windows cut from a stream."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import drive, stream_of

from metaopt import guards
from metaopt.tasks import quadratic

TASK = quadratic(5, noise=0.3)
START = TASK.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("rule", "losses", "ambiguous"),
    [
        ("std", [[1.0, 3.0, 1.0, 3.0], [3.5, 5.5, 3.5, 5.5]], False),  # 2.5 > 1 + 1
        ("std", [[1.0, 3.0, 1.0, 3.0], [3.0, 5.0, 3.0, 5.0]], True),  # 2 <= 1 + 1
        ("sem", [[1.0, 3.0, 1.0, 3.0], [3.0, 5.0, 3.0, 5.0]], False),  # 2 > (1 + 1) / 2
        ("sem", [[1.0, 3.0, 1.0, 3.0], [1.9, 3.9, 1.9, 3.9]], True),
        ("paired", [[1.0, 3.0, 1.0, 3.0], [1.9, 3.9, 1.9, 3.9]], False),  # always 0.9 apart
        ("paired", [[1.0, 3.0, 1.0, 3.0], [0.5, 3.6, 1.5, 2.5]], True),
        ("std", [[jnp.nan, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], False),
        ("std", [[jnp.inf] * 4, [jnp.inf] * 4], False),
    ],
)
def test_the_three_rules(rule, losses, ambiguous):
    padded = jnp.concatenate([jnp.array(losses), jnp.full((2, 3), 1e6)], axis=1)
    mask = jnp.arange(7) < 4
    assert guards.Adaptive(rule=rule).ambiguous(padded, mask) == ambiguous


def test_sizes_double_keep_their_ratio_and_stop_at_the_cap():
    adaptive = guards.Adaptive(rule="std", cap=25)
    guard = guards.lgl2o(optax.sgd(0.3), optax.sgd(0.29), n_t=6, n_c=2, adaptive=adaptive)
    traces = []

    def window(x, state, train, validation):
        traces.append(len(train))
        updates, state = guard.update(
            None, state, x, loss_fn=TASK.loss, train_batches=train, eval_batches=validation
        )
        return optax.apply_updates(x, updates), state

    guard = guards.in_windows(guard)
    x, state, sizes = START, guard.init(START), []
    window = jax.jit(window)
    cut = guards.windows(stream_of(TASK, 120), lambda: state.info.n_t, lambda: state.info.n_c)
    for train, validation in cut:
        x, state = window(x, state, train, validation)
        sizes.append((len(train), len(validation)))
    assert sizes[0] == (6, 2)
    assert sizes == sorted(sizes) and sizes[-1] == (24, 8)
    assert all(n_t == 3 * n_c for n_t, n_c in sizes)
    assert traces == sorted(set(traces))  # one compilation per size


def test_nothing_grows_while_the_candidates_differ():
    adaptive = guards.Adaptive(rule="paired")
    guard = guards.lgl2o(optax.sgd(0.5), optax.sgd(0.0), n_t=3, n_c=3, adaptive=adaptive)
    _, state = drive(guard, quadratic(5, noise=0.0), START, 3, op_by_op=False)[-1]
    assert state.info.n_t == 3


@pytest.mark.parametrize("rule", ["std", "paired"])
def test_a_stream_grows_alike_and_compiles_once(rule):
    adaptive = guards.Adaptive(rule=rule, cap=8)
    guard = guards.lgl2o(optax.sgd(0.3), optax.sgd(0.25), n_t=2, n_c=2, adaptive=adaptive)
    traces, batches = [], stream_of(TASK, 60)

    @jax.jit
    def call(x, state, batch):
        traces.append(None)
        updates, state = guard.update(None, state, x, value_fn=lambda p: TASK.loss(p, batch))
        return optax.apply_updates(x, updates), state

    x, state, stream_trail = START, guard.init(START), []
    for batch in batches:
        x, state = call(x, state, batch)
        if state.position == 0:
            stream_trail.append((x, state.info))
    window_form = guards.in_windows(guard)
    y, other, window_trail = START, window_form.init(START), []
    update = jax.jit(window_form.update, static_argnames="loss_fn")
    cut = guards.windows(batches, lambda: other.info.n_t, lambda: other.info.n_c)
    for train, validation in cut:
        updates, other = update(
            None, other, y, loss_fn=TASK.loss, train_batches=train, eval_batches=validation
        )
        y = optax.apply_updates(y, updates)
        window_trail.append((y, other.info))
    assert len(traces) == 1 and len(stream_trail) == len(window_trail)
    for (a, info), (b, expected) in zip(stream_trail, window_trail, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert info.n_t == expected.n_t and info.winner == expected.winner
    assert window_trail[-1][1].n_t > 2


def test_windows_cut_training_before_validation_and_drop_the_rest():
    stream = ({"x": np.full((2, 3), i), "y": i} for i in range(11))
    cut = list(guards.windows(stream, 3, 2))
    assert len(cut) == 2
    train, validation = cut[1]
    assert isinstance(train["x"], np.ndarray) and train["x"].shape == (3, 2, 3)
    assert train["y"].tolist() == [5, 6, 7] and validation["y"].tolist() == [8, 9]
    ((train, _),) = guards.windows([jnp.ones(3)] * 2, 1, 1)
    assert isinstance(train, jax.Array)
    without = list(guards.windows([np.ones(3)] * 5, 2, 0))
    assert [validation for _, validation in without] == [None, None]


def test_windows_errors():
    for n_t, n_c, message in ((0, 1, "n_t must be at least 1"), (1, -1, "n_c must be at least 0")):
        with pytest.raises(ValueError, match=f"windows: {message}"):
            guards.windows([], n_t, n_c)
    with pytest.raises(ValueError, match="must have one shape"):
        next(guards.windows([np.ones(3), np.ones(2), np.ones(3)], 2, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "var"}, "rule must be one of std, sem, paired, got 'var'"),
        ({"growth": 1}, "growth must be at least 2, got 1"),
        ({"cap": 9}, "cap must be at least n_t and n_c"),
        ({"n_c": 1}, "n_c must be at least 2 with adaptive sizes, got 1"),
    ],
)
def test_adaptive_options(options, message):
    n_c = options.pop("n_c", 10)
    with pytest.raises(ValueError, match=message):
        adaptive = guards.Adaptive(**options)
        guards.lgl2o(optax.sgd(0.1), optax.sgd(0.1), n_c=n_c, adaptive=adaptive)


def test_a_window_of_a_size_that_cannot_be():
    guard = guards.in_windows(
        guards.lgl2o(optax.sgd(0.1), optax.sgd(0.1), n_t=2, n_c=2, adaptive=guards.Adaptive(cap=4))
    )
    for n_t, n_c in ((3, 2), (4, 2), (8, 8)):
        window = dict(train_batches=stream_of(TASK, n_t), eval_batches=stream_of(TASK, n_c))
        with pytest.raises(ValueError, match=r"lgl2o: (train|eval)_batches holds"):
            guard.update(None, guard.init(START), START, loss_fn=TASK.loss, **window)
