"""The contract of every guard in windows; for optimizers see test_optimizer_contract.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from metaopt import guards, optimizers

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.array([0.5, 0.5, 0.5])}
FAMILY = optimizers.lstm(hidden=2, layers=1)
THETAS = jax.vmap(FAMILY.init, (0, None))(jax.random.split(jax.random.key(7), 2), PARAMS)
SIZES = {"n_t": 2, "n_c": 2}
GUARDS = {
    "gl2o": lambda theta: guards.gl2o(FAMILY.apply(theta), optax.adam(0.1)),
    "lgl2o": lambda theta: guards.lgl2o(FAMILY.apply(theta), optax.adam(0.1), **SIZES),
    "race": lambda theta: guards.race(
        FAMILY.apply(theta), optax.sgd(0.1), optax.adam(0.1), n_t=2, patience=1, trial=1, budget=0.4
    ),
    "race_held_out": lambda theta: guards.race(FAMILY.apply(theta), optax.sgd(0.1), **SIZES),
    "smg": lambda theta: guards.smg(FAMILY, theta, lr_params=0.1, **SIZES),
    "amg": lambda theta: guards.amg(FAMILY, theta, lr_params=0.1, **SIZES),
}


def window_loss(params, batch):
    return sum(
        jnp.mean((leaf - batch).astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(params)
    )


def one_window(name):
    """``(theta, params, state, key) -> params, state``, with an unknown extra arg."""

    def window(theta, params, state, key):
        guard = GUARDS[name](theta)
        n_t, n_c = (2, 0) if name == "gl2o" else guard.window
        train, validation = jnp.split(jax.random.normal(key, (n_t + n_c,)), [n_t])
        guard = guards.in_windows(guard)
        updates, state = guard.update(
            None,
            state,
            params,
            loss_fn=window_loss,
            train_batches=train,
            eval_batches=validation if n_c else None,
            something="else",
        )
        return optax.apply_updates(params, updates), state

    return window


@pytest.fixture(params=GUARDS, scope="module")
def run_of_guard(request):
    """Returns a guard's name, traces of its compiled window, and params and states of a run."""
    name, traces = request.param, []

    @jax.jit
    def window(*args):
        traces.append(1)
        return one_window(name)(*args)

    theta, params = jax.tree.map(lambda t: t[0], THETAS), PARAMS
    states = [GUARDS[name](theta).init(params)]
    for key in jax.random.split(jax.random.key(8), 3):
        params, state = window(theta, params, states[-1], key)
        states.append(state)
    return name, traces, params, states


def test_a_guard_moves_takes_unknown_extra_args_and_compiles_once(run_of_guard):
    _, traces, params, states = run_of_guard
    assert len(traces) == 1
    assert optax.tree.norm(optax.tree.sub(params, PARAMS)) > 0
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    assert shapes(states[0]) == shapes(states[-1])


def test_a_guards_diagnostics_are_in_its_state(run_of_guard):
    states = run_of_guard[3]
    get = lambda name: optax.tree_utils.tree_get(states[-1], name)
    assert get("windows") == (6 if run_of_guard[0] == "gl2o" else 3)  # gl2o decides at every step
    assert get("gradient_evals") > 0 and get("accepted").dtype == bool


def test_orbax_saves_and_restores_a_guards_state(run_of_guard, tmp_path):
    states = run_of_guard[3]
    assert hasattr(type(states[-1]), "_fields")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states[-1])
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", states[0])
    assert type(restored) is type(states[-1])
    jax.tree.map(np.testing.assert_array_equal, restored, states[-1])


def test_a_guard_under_vmap_over_theta_params_and_seeds_is_a_loop(run_of_guard):
    name = run_of_guard[0]

    def run(theta, params, key):
        state = GUARDS[name](theta).init(params)
        window = lambda carry, k: (one_window(name)(theta, *carry, k), None)
        return jax.lax.scan(window, (params, state), jax.random.split(key, 2))[0]

    starts = jax.tree.map(lambda p: jnp.stack([p, 3.0 * p]), PARAMS)
    keys = jax.random.split(jax.random.key(9), 2)
    vmapped, states = jax.jit(jax.vmap(run))(THETAS, starts, keys)
    loop = jax.jit(run)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for i in range(2):
        pick = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        single, state = loop(pick(THETAS), pick(starts), keys[i])
        jax.tree.map(close, pick(vmapped), single)
        wins = lambda s: optax.tree_utils.tree_get(s, "wins").tolist()
        assert wins(pick(states)) == wins(state)


@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_keeps_every_leafs_dtype(name):
    theta = jax.tree.map(lambda t: t[0], THETAS)
    mixed = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"]}
    shapes = jax.eval_shape(
        one_window(name), theta, mixed, GUARDS[name](theta).init(mixed), jax.random.key(0)
    )
    assert jax.tree.map(lambda x: x.dtype, shapes[0]) == jax.tree.map(lambda x: x.dtype, mixed)
