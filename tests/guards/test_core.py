"""Errors of both forms of all guards, and the functions behind every decision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from guard_cases import stream_of, tiny

from metaopt import guards
from metaopt.core.rollouts import windowed
from metaopt.core.types import LearnedOptimizer
from metaopt.guards import core
from metaopt.tasks import quadratic

TASK = quadratic(5, noise=0.3)
X = jnp.ones(5)
FAMILY = tiny()
THETA = FAMILY.init(jax.random.key(0), X)
WINDOW = dict(loss_fn=TASK.loss, train_batches=stream_of(TASK, 3), eval_batches=stream_of(TASK, 2))
GUARDS = {
    "lgl2o": lambda: guards.lgl2o(optax.sgd(0.2), optax.sgd(0.1), n_t=3, n_c=2),
    "race": lambda: guards.race(optax.sgd(0.2), optax.sgd(0.1), n_t=3, n_c=2),
    "smg": lambda: guards.smg(FAMILY, THETA, n_t=1, n_c=2),
    "amg": lambda: guards.amg(FAMILY, THETA, n_t=1, n_c=2),
}


@pytest.mark.parametrize("kind", GUARDS)
@pytest.mark.parametrize("missing", ["loss_fn", "train_batches", "eval_batches"])
def test_what_is_missing_is_named(kind, missing):
    guard = guards.in_windows(GUARDS[kind]())
    window = {key: value for key, value in WINDOW.items() if key != missing}
    with pytest.raises(ValueError, match=f"{kind}: update is missing {missing}; call"):
        guard.update(None, guard.init(X), X, **window)


@pytest.mark.parametrize("kind", GUARDS)
def test_updates_and_params(kind):
    guard = guards.in_windows(GUARDS[kind]())
    with pytest.raises(ValueError, match=f"{kind}: pass updates=None"):
        guard.update(X, guard.init(X), X, **WINDOW)
    with pytest.raises(ValueError, match=f"{kind}: update needs `params`"):
        guard.update(None, guard.init(X), **WINDOW)


@pytest.mark.parametrize("kind", [*GUARDS, "gl2o"])
def test_a_step_names_what_is_missing(kind):
    guard = guards.gl2o(optax.sgd(0.2), optax.sgd(0.1)) if kind == "gl2o" else GUARDS[kind]()
    with pytest.raises(ValueError, match=f"{kind}: update is missing params; call"):
        guard.update(X, guard.init(X), value_fn=jnp.sum)
    with pytest.raises(ValueError, match=f"{kind}: update is missing value_fn; call"):
        guard.update(X, guard.init(X), X)


def test_in_windows_takes_guards_only():
    for other in (optax.sgd(0.1), guards.in_windows(GUARDS["race"]())):
        with pytest.raises(ValueError, match=r"in_windows: takes a guard .*metaopt\.windowed"):
            guards.in_windows(other)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*GUARDS, "gl2o"])
def test_a_part_of_the_params_is_no_problem_of_its_own(kind):
    """The loss needs all params: `optax.masked` belongs into a guard, not around it."""
    guard = guards.gl2o(optax.sgd(0.2), optax.sgd(0.1)) if kind == "gl2o" else GUARDS[kind]()
    params = {"w": X, "b": X}
    masked = optax.masked(guard, {"w": True, "b": False})
    labels = {"w": "a", "b": "b"}
    parted = optax.partition({"a": guard, "b": optax.sgd(0.1)}, labels)
    for tx in (masked, parted):
        with pytest.raises(ValueError, match=f"{kind}: some params are masked.*inside the guard"):
            tx.init(params)


@pytest.mark.parametrize("kind", GUARDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batches": stream_of(TASK, 4)}, "train_batches holds 4 mini-batches, .* take 3"),
        ({"eval_batches": stream_of(TASK, 3)}, "eval_batches holds 3 mini-batches, .* take 2"),
        (
            {"train_batches": {"x": jnp.ones((3, 5)), "y": jnp.ones(2)}},
            "all arrays of train_batches must share a leading axis",
        ),
        ({"eval_batches": jnp.ones(())}, "all arrays of eval_batches must share a leading axis"),
        ({"eval_batches": {}}, "all arrays of eval_batches must share a leading axis"),
    ],
)
def test_batches_that_are_no_window(kind, change, message):
    guard = guards.in_windows(GUARDS[kind]())
    with pytest.raises(ValueError, match=f"{kind}: {message}"):
        guard.update(None, guard.init(X), X, **{**WINDOW, **change})


@pytest.mark.parametrize("kind", GUARDS)
def test_unknown_extra_args_are_ignored(kind):
    guard = guards.in_windows(GUARDS[kind]())
    guard.update(None, guard.init(X), X, **WINDOW, temperature=3.0)


@pytest.mark.parametrize("make", [guards.lgl2o, guards.race, guards.gl2o])
@pytest.mark.parametrize("role", ["learned", "fallback"])
def test_an_inner_transformation_that_needs_more(role, make):
    def update(updates, state, params=None, *, rng, **extra_args):
        return updates, state

    needy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    pair = (needy, optax.sgd(0.1)) if role == "learned" else (optax.sgd(0.1), needy)
    guard = make(*pair)
    guard = windowed(guard) if make is guards.gl2o else guards.in_windows(make(*pair, n_t=3, n_c=2))
    name = make.__name__ + ": the " + role.replace("back", "back( 0)?")
    message = f"{name} transformation takes other extra args .* value_fn: .*'rng'"
    with pytest.raises(TypeError, match=message):
        guard.update(None, guard.init(X), X, **WINDOW)


@pytest.mark.parametrize("make", [guards.smg, guards.amg])
def test_a_family_that_needs_more(make):
    def update(updates, state, params=None, *, rng, **extra_args):
        return updates, state

    needy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    family = LearnedOptimizer(lambda key, params: THETA, lambda theta, *, num_steps=None: needy)
    guard = guards.in_windows(make(family, THETA, n_t=1, n_c=2))
    message = f"{make.__name__}: the learned transformation takes other extra args .*'rng'"
    with pytest.raises(TypeError, match=message):
        guard.update(None, guard.init(X), X, **WINDOW)


@pytest.mark.parametrize("make", [guards.lgl2o, guards.race])
@pytest.mark.parametrize(("size", "least"), [("n_t", 1), ("n_c", 0)])
def test_windows_without_mini_batches(make, size, least):
    message = f"{make.__name__}: {size} must be at least {least}, got {least - 1}"
    with pytest.raises(ValueError, match=message):
        make(optax.sgd(0.1), optax.sgd(0.1), **{size: least - 1})


def test_an_error_inside_of_an_inner_transformation_is_left_alone():
    def update(updates, state, params=None):
        raise TypeError("bad leaf")

    broken = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    guard = guards.in_windows(guards.lgl2o(broken, optax.sgd(0.1), n_t=3, n_c=2))
    with pytest.raises(TypeError, match=r"^bad leaf"):
        guard.update(None, guard.init(X), X, **WINDOW)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (FAMILY, "learned is a LearnedOptimizer, a whole family"),
        (guards.in_windows(GUARDS["race"]()), "learned is in window form"),
        (3, "learned must be an optax transformation, got 3"),
    ],
)
def test_parts_that_cannot_be_stepped(part, message):
    for make in (guards.lgl2o, guards.race, guards.gl2o):
        with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
            make(part, optax.sgd(0.1))


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_selection_never_blends(poison):
    """A candidate that is not finite changes neither the kept one nor its gradient."""
    kept = {"a": jnp.ones(3), "n": jnp.array(2)}
    bad = {"a": jnp.full(3, poison), "n": jnp.array(5)}
    selected = core.select(jnp.array(1), (bad, kept), bad)
    np.testing.assert_array_equal(selected["a"], kept["a"])
    assert selected["n"] == 2
    gradient = jax.grad(lambda a: jnp.sum(core.select(jnp.array(1), (bad["a"], a), bad["a"])))
    np.testing.assert_array_equal(gradient(kept["a"]), jnp.ones(3))


def test_scores():
    mask = jnp.array([True, True, False])
    score = lambda *losses, point=1.0: core.score(jnp.array(losses), mask, jnp.array(point))
    assert score(1.0, 3.0, 100.0) == 2.0
    assert score(1.0, 3.0, jnp.nan) == 2.0
    for losses in ((jnp.nan, 0.0), (jnp.inf, 0.0), (-jnp.inf, 0.0)):
        assert score(*losses, 0.0) == jnp.inf
    assert score(1.0, 3.0, 0.0, point=jnp.inf) == jnp.inf


def test_step_counts_are_global_but_those_of_moments():
    """A schedule goes on; Adam's count is the number of gradients in its moments."""
    state = optax.adam(optax.constant_schedule(0.1)).init(X)
    newer = jax.tree.map(lambda leaf: leaf + 7, state)
    adam, schedule = core.keep_counts(state, newer)
    assert adam.count == 0 and schedule.count == 7
    assert np.all(adam.mu == 0) and np.all(adam.nu == 0)
