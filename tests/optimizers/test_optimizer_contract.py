"""What every optimizer must do: be an optax transformation, and a pure function of theta.

The contract of guards is tested in tests/guards/test_guard_contract.py.
"""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training import train_state

import metaopt
from metaopt import optimizers
from metaopt.core.rollouts import unroll
from metaopt.optimizers.train_state import TrainState
from metaopt.tasks import quadratic

CASES = {
    "lstm": lambda: optimizers.lstm(hidden=4),
    "l3rs": optimizers.l3rs,
    "l3rs-none": lambda: optimizers.l3rs(variant="none"),
    "velo": lambda: optimizers.velo(hidden=8, bank=4),
    "celo_adam": lambda: optimizers.celo_adam(hidden=8),
    "celo2": optimizers.celo2_adamw,
    "sgd": optimizers.sgd,
    "adam": optimizers.adam,
    "adamw": optimizers.adamw,
}
PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.array([0.5, 0.5, 0.5])}
GRADS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.arange(3.0) - 1.0}


PARTS = {"all": PARAMS, "w": {"w": PARAMS["w"]}}


@cache
def built(name) -> metaopt.LearnedOptimizer:
    return CASES[name]()


@pytest.fixture(params=CASES)
def lopt(request) -> metaopt.LearnedOptimizer:
    return built(request.param)


@cache
def transformation(lopt, part="all"):
    return lopt.apply(jax.jit(lopt.init)(jax.random.key(0), PARTS[part]), num_steps=20)


def step(tx, params=PARAMS, grads=GRADS, n=1, **extra):
    """Sums of n steps at the same params and gradients."""
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.float32(1.0), **extra))
    state, total = tx.init(params), optax.tree.zeros_like(params)
    for _ in range(n):
        updates, state = update(grads, state, params)
        total = optax.tree.add(total, updates)
    return total, state


@cache
def alone(lopt, part="all"):
    """The first step of the transformation as it is."""
    return step(
        transformation(lopt, part), PARTS[part], {name: GRADS[name] for name in PARTS[part]}
    )


def same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), **{"rtol": 1e-5, **tolerance}
        )


def test_unknown_extra_args_are_swallowed(lopt):
    tx = transformation(lopt)
    extra, _ = step(tx, something="else", grad=None)
    same(alone(lopt)[0], extra)


def test_chain_scales_and_adds_decoupled_weight_decay(lopt):
    plain, _ = alone(lopt)
    decayed = optax.chain(transformation(lopt), optax.scale(0.5), optax.add_decayed_weights(-0.1))
    expected = jax.tree.map(lambda u, p: 0.5 * u - 0.1 * p, plain, PARAMS)
    same(step(decayed)[0], expected)


def test_a_schedule_composes(lopt):
    tx = optax.chain(transformation(lopt), optax.scale_by_schedule(lambda t: 1.0 * (t < 1)))
    same(step(tx, n=3)[0], alone(lopt)[0])


def test_masked_optimizes_the_chosen_leaves(lopt):
    mask = {"w": True, "b": False}
    tx = optax.chain(
        optax.masked(transformation(lopt, "w"), mask),
        optax.masked(optax.set_to_zero(), {"w": False, "b": True}),
    )
    same(step(tx)[0], {**alone(lopt, "w")[0], "b": jnp.zeros(3)})


def test_partition_gives_each_part_its_optimizer(lopt):
    tx = optax.partition(
        {"ours": transformation(lopt, "w"), "sgd": optax.sgd(0.1)},
        {"w": "ours", "b": "sgd"},
    )
    same(step(tx)[0], {**alone(lopt, "w")[0], "b": -0.1 * GRADS["b"]})


def test_inject_hyperparams_can_hold_the_horizon(lopt):
    theta = lopt.init(jax.random.key(0), PARAMS)
    factory = optax.inject_hyperparams(lambda num_steps: lopt.apply(theta, num_steps=num_steps))
    same(step(factory(num_steps=20))[0], alone(lopt)[0])


def test_multi_steps_averages_gradients(lopt):
    tx = optax.MultiSteps(transformation(lopt), every_k_schedule=2)
    same(step(tx, n=2)[0], alone(lopt)[0])


def test_multi_steps_gets_the_loss_in_train_state_and_unroll():
    tx = optax.MultiSteps(transformation(built("l3rs-none")), every_k_schedule=2)
    state = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx)
    for _ in range(2):
        state = state.apply_gradients(grads=GRADS, value=jnp.float32(1.0))
    expected = optax.apply_updates(PARAMS, alone(built("l3rs-none"))[0])
    same(state.params, expected)
    loss = lambda p, batch: 1.0 + optax.tree.vdot(p, GRADS) - optax.tree.vdot(PARAMS, GRADS)
    same(unroll(tx, PARAMS, tx.init(PARAMS), loss, jnp.zeros(2))[0], expected)


def test_train_state_trains_a_flax_model_and_compiles_its_step_once(lopt):
    model = nn.Dense(3)
    x, y = jax.random.normal(jax.random.key(1), (8, 4)), jnp.ones((8, 3))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    theta = jax.jit(lopt.init)(jax.random.key(0), params)
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=lopt.apply(theta, num_steps=5)
    )

    traces = []

    @jax.jit
    def train_step(state):
        traces.append(1)
        loss_fn = lambda p: jnp.mean((state.apply_fn({"params": p}, x) - y) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, value=loss)

    for _ in range(3):
        state = train_step(state)
    assert state.step == 3 and len(traces) == 1
    assert optax.tree.norm(optax.tree.sub(state.params, params)) > 0


@pytest.mark.parametrize("name", ["lstm", "velo", "celo_adam", "celo2"])  # l3rs: test_l3rs.py
def test_nnx_optimizer_takes_the_steps_of_the_transformation(name):
    """It keeps a state's nodes as mappings of its own kind."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = transformation(built(name))
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(plain)
    grads = {"bias": GRADS["b"], "kernel": GRADS["w"]}
    for _ in range(2):
        updates, state = tx.update(grads, state, plain, value=jnp.float32(1.0))
        plain = optax.apply_updates(plain, updates)
        nnx_grads = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(nnx_grads, grads)
        optimizer.update(model, nnx_grads, value=jnp.float32(1.0))
    same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), plain)


GUARDS = {
    "race": lambda learned: metaopt.guards.race(learned, optax.adam(0.1), n_t=2),
    "lgl2o": lambda learned: metaopt.guards.lgl2o(learned, optax.adam(0.1), n_t=1, n_c=1),
    "gl2o": lambda learned: metaopt.guards.gl2o(learned, optax.adam(0.1)),
}


@pytest.mark.parametrize("name, guard", [("velo", "race"), *(("celo2", guard) for guard in GUARDS)])
def test_nnx_optimizer_takes_the_steps_of_a_guard(name, guard):
    """It makes mappings of named tuples in trees of params, as VeLO has them."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = GUARDS[guard](transformation(built(name)))
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(plain)
    value_fn = lambda params: optax.tree.norm(params, squared=True)
    for _ in range(4):
        updates, state = tx.update(None, state, plain, value_fn=value_fn)
        plain = optax.apply_updates(plain, updates)
        grads = jax.tree.map(lambda x: 2 * x, nnx.state(model, nnx.Param))
        optimizer.update(model, grads, value_fn=value_fn)
    same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), plain)


@pytest.mark.parametrize("guard", [metaopt.guards.smg, metaopt.guards.amg])
def test_nnx_optimizer_takes_the_steps_of_a_meta_guard(guard):
    """Its state holds theta, and params of several runs."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    momentum = lambda theta, *, num_steps=None: optax.chain(
        optax.trace(theta["decay"]), optax.scale(theta["scale"])
    )
    theta = {"decay": jnp.float32(0.5), "scale": jnp.float32(-0.1)}
    learned = metaopt.LearnedOptimizer(init=lambda key, params: theta, apply=momentum)
    tx = guard(learned, theta, n_t=1, n_c=1, num_steps=20, lr_params=0.1)
    optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(plain)
    value_fn = lambda params: optax.tree.norm(params, squared=True)
    start = value_fn(plain)
    for _ in range(2 * tx.period):
        updates, state = tx.update(None, state, plain, value_fn=value_fn)
        plain = optax.apply_updates(plain, updates)
        grads = jax.tree.map(lambda x: 2 * x, nnx.state(model, nnx.Param))
        optimizer.update(model, grads, value_fn=value_fn)
    assert value_fn(plain) < start
    same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), plain)


@pytest.mark.parametrize("name", ["lstm", "sgd", "adam"])
def test_flaxs_own_train_state_suffices_where_the_loss_is_not_needed(name):
    tx = transformation(built(name))
    state = train_state.TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx)
    after = state.apply_gradients(grads=GRADS)
    same(after.params, optax.apply_updates(PARAMS, alone(built(name))[0]))


def test_train_state_holds_a_guard_and_its_model_state():
    """The loss counts its calls in the model state, as BatchNorm keeps statistics there."""
    tx = metaopt.guards.race(optax.sgd(0.2), optax.sgd(0.1), n_t=2)
    calls = jnp.zeros(())
    state = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx, model_state=calls)

    @jax.jit
    def train_step(state):
        value_fn = lambda params, calls: (optax.tree.norm(params, squared=True), calls + 1)
        return state.apply_gradients(grads=None, value_fn=value_fn)

    for _ in range(3):
        state = train_step(state)
    assert state.step == 3
    assert metaopt.guards.model_state(state.opt_state) == 3
    assert optax.tree.get(state.opt_state, "leader_loss") < optax.tree.norm(PARAMS, squared=True)


def test_train_state_without_a_model_state_passes_value_fn():
    tx = metaopt.guards.lgl2o(optax.sgd(0.2), optax.sgd(0.1), n_t=1, n_c=0)
    state = TrainState.create(apply_fn=lambda: None, params=PARAMS, tx=tx)
    value_fn = lambda params: optax.tree.norm(params, squared=True)
    after = state.apply_gradients(grads=None, value_fn=value_fn)
    assert value_fn(after.params) < value_fn(PARAMS)


@pytest.mark.parametrize("name", ["lstm", "l3rs"])  # velo: tests/optimizers/test_velo.py
def test_vmap_over_theta_equals_a_loop_and_grad_is_finite(name):
    lopt, task = built(name), quadratic(dim=4)
    x, batches = task.init(jax.random.key(1)), task.sample(jax.random.key(2), (5,))

    def final(theta):
        tx = lopt.apply(theta, num_steps=5)
        return task.loss(unroll(tx, x, tx.init(x), task.loss, batches)[0], jnp.zeros(4))

    thetas = jax.vmap(lopt.init, (0, None))(jax.random.split(jax.random.key(3), 3), x)
    one_by_one = [jax.jit(final)(jax.tree.map(lambda t, i=i: t[i], thetas)) for i in range(3)]
    np.testing.assert_allclose(jax.jit(jax.vmap(final))(thetas), jnp.stack(one_by_one), rtol=1e-5)
    slopes = jax.jit(jax.grad(final))(jax.tree.map(lambda t: t[0], thetas))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert optax.tree.norm(slopes) > 0


@pytest.mark.parametrize("name", ["lstm", "l3rs", "velo"])
def test_bfloat16_params_get_bfloat16_updates_near_the_float32_ones(name):
    tx = transformation(built(name))
    half = lambda tree: optax.tree.cast(tree, jnp.bfloat16)
    updates, _ = step(tx, half(PARAMS), half(GRADS))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(updates))
    expected, _ = step(tx, optax.tree.cast(half(PARAMS), jnp.float32), half_values(GRADS))
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    same(updates, expected, rtol=0.02, atol=0.01 * scale)


def half_values(tree):
    return optax.tree.cast(optax.tree.cast(tree, jnp.bfloat16), jnp.float32)


@pytest.mark.parametrize("name", ["lstm", "l3rs", "l3rs-no-averages", "velo"])
def test_orbax_saves_and_restores_the_state(name, tmp_path):
    make = {**CASES, "l3rs-no-averages": lambda: optimizers.l3rs(ema="none")}[name]
    tx = transformation(make())
    _, state = step(tx, n=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", tx.init(PARAMS))
    same(restored, state, rtol=0)
    assert type(restored) is type(state)


@pytest.mark.parametrize("name", ["lstm", "l3rs", "velo"])
def test_wrong_trees_and_dtypes_are_named(name):
    tx = transformation(built(name))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=f"{name}.*int32"):
        tx.init({"w": jnp.ones(3, jnp.int32)})
    other = {"w": PARAMS["w"]}
    with pytest.raises(ValueError, match=name):
        tx.update(other, state, other, value=1.0)  # the state of other params
    if name != "lstm":  # which needs no params
        with pytest.raises(ValueError, match=f"{name}.*missing.*b"):
            tx.update(other, state, PARAMS, value=1.0)
        with pytest.raises(ValueError, match=r"shape \(3, 4\), expected \(4, 3\)"):
            tx.update({**GRADS, "w": GRADS["w"].T}, state, PARAMS, value=1.0)
