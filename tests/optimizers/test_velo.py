"""VeLO against published trajectories and a second implementation, and its properties."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from velo_reference import random_theta, replay

import metaopt
from metaopt.optimizers.layouts import theta_from_named
from metaopt.optimizers.velo import velo

GOLDEN = Path(__file__).parents[1] / "golden"
NAMED = random_theta(0)
THETA = theta_from_named("velo", NAMED)
SHAPES = {"w": (4, 3), "b": (3,)}


def draw(shapes, num_steps, seed=1):
    """Returns params, gradients of many magnitudes with exact zeros, and losses."""
    rng = np.random.default_rng(seed)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}

    def grad(shape):
        size = 10.0 ** rng.uniform(-4, 2)
        return jnp.asarray(rng.normal(size=shape) * size * (rng.random(shape) < 0.8), jnp.float32)

    grads = [{k: grad(s) for k, s in shapes.items()} for _ in range(num_steps)]
    return params, grads, np.exp(rng.normal(size=num_steps)).astype(np.float32)


def run(tx, params, grads, losses, update=None):
    """Returns params after every step, and the last state."""
    state, update, history = tx.init(params), update or jax.jit(tx.update), []
    for g, value in zip(grads, losses, strict=True):
        updates, state = update(g, state, params, value=value)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def assert_close(actual, expected, tolerance=5e-4):
    """Bounds the largest difference, relative to the root mean square of the tensor."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.all(np.isfinite(actual))
    assert np.max(np.abs(actual - expected)) <= tolerance * np.sqrt(np.mean(expected**2))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def small():
    """Returns one optimizer, its compiled update, params, gradients and losses."""
    tx = velo().apply(THETA, num_steps=50)
    return tx, jax.jit(tx.update), *draw(SHAPES, 6)


@pytest.mark.parametrize(
    "name", [pytest.param("velo_small_1", marks=pytest.mark.optimized), "velo_small_2"]
)
def test_reproduces_the_published_implementation(name):
    data = np.load(GOLDEN / f"{name}.npz")
    theta = theta_from_named("velo", {k: data[k] for k in data if k.startswith("theta/")})
    names = [k.removeprefix("params/") for k in data if k.startswith("params/")]
    params = {k: jnp.asarray(data[f"params/{k}"]) for k in names}
    grads = [{k: data[f"grads/{k}"][t] for k in names} for t in range(len(data["loss"]))]
    tx = velo().apply(theta, num_steps=int(data["num_steps"]))
    history, state = run(tx, params, grads, data["loss"])
    assert int(state.skipped) == 0
    for t, actual in enumerate(history):
        for k in names:
            assert_close(actual[k], data[f"after/{k}"][t])


@pytest.mark.parametrize(
    "shapes",
    [
        [(), (1,), (9,), (1, 1), (6, 1)],  # rank counts axes longer than 1
        [(3, 3), (4, 1, 5), (3, 3, 2, 4)],  # ties between axes
        [(2, 1, 2, 3, 2), (2, 2, 2, 2, 2, 2)],  # rank 5 and more: no bit set
    ],
    ids=["short", "ties", "deep"],
)
def test_agrees_with_a_second_implementation_within_and_past_the_horizon(shapes):
    num_steps = 6
    params, grads, losses = draw(dict(enumerate(shapes)), num_steps + 3)
    losses[4] = 40.0  # a spike, which the loss buffer cuts
    tx = velo(warn_past_horizon=False).apply(THETA, num_steps=num_steps)
    history, _ = run(tx, params, grads, losses)
    flat = [[g[k] for k in range(len(shapes))] for g in grads]
    start = [params[k] for k in range(len(shapes))]
    reference = replay(NAMED, start, flat, losses, num_steps)
    for actual, expected in zip(history, reference, strict=True):
        for k in range(len(shapes)):
            assert_close(actual[k], expected[k], 2e-5)


def test_the_order_of_tensors_does_not_matter(small):
    tx, update, params, grads, losses = small
    history, _ = run(tx, params, grads, losses, update)
    rename = lambda tree: {"a": tree["w"], "z": tree["b"]}
    other, _ = run(tx, rename(params), [rename(g) for g in grads], losses)
    assert list(params) != list(rename(params))
    for actual, expected in zip(other, history, strict=True):
        assert_close(actual["a"], expected["w"], 1e-6)
        assert_close(actual["z"], expected["b"], 1e-6)


@pytest.mark.parametrize("where", ["gradient", "loss", "params"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(small, where, value):
    tx, update, params, grads, losses = small
    _, before = update(grads[0], tx.init(params), params, value=losses[0])
    bad = {"gradient": grads[1], "loss": losses[1], "params": params}
    if where == "loss":
        bad["loss"] = jnp.float32(value)
    else:
        bad[where] = {**bad[where], "w": bad[where]["w"].at[2, 1].set(value)}
    updates, after = update(bad["gradient"], before, bad["params"], value=bad["loss"])
    assert_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert_equal(after, before._replace(t=before.t + 1, skipped=before.skipped + 1))
    updates, after = update(grads[2], after, params, value=losses[2])
    assert all(np.all(np.isfinite(u)) and np.any(u != 0) for u in jax.tree.leaves(updates))
    assert int(after.skipped) == 1


def test_large_finite_gradients_are_clipped_and_not_skipped(small):
    tx, update, params, grads, losses = small
    huge, cut = ({**grads[0], "w": jnp.full((4, 3), x)} for x in (1e30, 1e3))
    actual = update(huge, tx.init(params), params, value=losses[0])
    assert_equal(actual, update(cut, tx.init(params), params, value=losses[0]))


def test_a_theta_that_is_not_finite_shows_in_the_params(small):
    _, _, params, grads, losses = small
    theta = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), THETA)
    history, _ = run(velo().apply(theta, num_steps=50), params, grads[:1], losses[:1])
    assert np.all(np.isnan(history[0]["w"]))


def test_passing_the_horizon_warns_once_also_inside_a_scan(small):
    _, _, params, grads, losses = small
    tx = velo().apply(THETA, num_steps=3)

    @jax.jit
    def whole(params, grads, losses):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(batch[0], state, params, value=batch[1])
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), (grads, losses))[0]

    stack = lambda n: jax.tree.map(lambda *x: jnp.stack(x), *grads[:n])
    with pytest.warns(UserWarning, match=r"past its horizon num_steps=3") as record:
        jax.block_until_ready(whole(params, stack(6), losses[:6]))
        jax.effects_barrier()
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.block_until_ready(whole(params, stack(3), losses[:3]))
        jax.effects_barrier()


def test_under_vmap_only_the_run_that_passes_its_horizon_warns(small):
    _, _, params, grads, losses = small
    horizons = jnp.array([1, 7])

    @jax.jit
    @jax.vmap
    def second_update(num_steps):
        tx = velo().apply(THETA, num_steps=num_steps)
        state = tx.init(params)._replace(t=jnp.int32(1))
        return tx.update(grads[0], state, params, value=losses[0])[1].t

    with pytest.warns(UserWarning, match="num_steps=1;") as record:
        jax.block_until_ready(second_update(horizons))
        jax.effects_barrier()
    assert len(record) == 1


def final_params(theta, params, grads, losses, num_steps=50):
    tx = velo(warn_past_horizon=False).apply(theta, num_steps=num_steps)

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(batch[0], state, params, value=batch[1])
        return (optax.apply_updates(params, updates), state), None

    batches = jax.tree.map(lambda *x: jnp.stack(x), *grads), jnp.asarray(losses)
    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def test_vmap_over_theta_and_a_traced_horizon_is_a_loop(small):
    _, _, params, grads, losses = small
    thetas = [theta_from_named("velo", random_theta(seed)) for seed in (3, 4)]
    horizons = jnp.array([10, 80])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *thetas)
    go = lambda theta, num_steps: final_params(theta, params, grads[:2], losses[:2], num_steps)
    vmapped = jax.jit(jax.vmap(go))(stacked, horizons)
    single = jax.jit(go)
    for k, (theta, num_steps) in enumerate(zip(thetas, horizons, strict=True)):
        for name, expected in single(theta, num_steps).items():
            assert_close(vmapped[name][k], expected, 1e-5)


def test_the_gradient_with_respect_to_theta_is_that_of_finite_differences(small):
    _, _, params, grads, losses = small
    grads = [{**g, "b": g["b"].at[0].set(0.0)} for g in grads]  # as of a dead unit
    flat, unravel = jax.flatten_util.ravel_pytree(THETA)

    @jax.jit
    def objective(flat):
        last = final_params(unravel(flat), params, grads[:3], losses[:3])
        return 1e2 * sum(jnp.sum(jnp.sin(x)) for x in last.values())

    slope = jax.jit(jax.grad(objective))(flat)  # of the matrix form, compared with the unrolled one
    assert np.all(np.isfinite(slope))
    tree = unravel(slope)
    np.testing.assert_array_equal(tree["rnn_params"]["linear"]["w"], 0.0)  # the unused layer
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = rng.normal(size=flat.size).astype(np.float32)
        h = 3e-4
        expected = (objective(flat + h * direction) - objective(flat - h * direction)) / (2 * h)
        np.testing.assert_allclose(slope @ direction, expected, rtol=3e-2)


def test_second_order_meta_gradients_survive_gradients_of_exactly_zero():
    def loss_fn(params, batch):
        return jnp.mean(jnp.square(batch * params - 1.0))

    params = jnp.array([0.1, 0.2, 0.3])
    batches = jnp.tile(jnp.array([1.0, -0.5, 0.0]), (3, 1))  # the last input is always zero

    @jax.jit
    @jax.grad
    def slope(theta):
        tx = velo().apply(theta, num_steps=5)
        start = (params, tx.init(params), loss_fn, batches)
        return metaopt.unroll(tx, *start)[2][-1]

    leaves = jax.tree.leaves(slope(THETA))
    assert all(np.all(np.isfinite(x)) for x in leaves) and any(np.any(x != 0) for x in leaves)


def test_the_second_step_does_not_compile_again(small):
    _, _, params, grads, losses = small
    tx, traces = velo().apply(THETA, num_steps=50), []

    @jax.jit
    def update(g, state, params, value):
        traces.append(None)
        return tx.update(g, state, params, value=value, unknown_extra_argument=1)

    state = tx.init(params)
    for g, value in zip(grads[:3], losses[:3], strict=True):
        updates, state = update(g, state, params, value)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1


def test_bfloat16_leaves_are_computed_in_float32(small):
    _, update, params, grads, losses = small
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, grads[0]))
    exact = optax.tree.cast(rounded, jnp.float32)
    tx = velo().apply(THETA, num_steps=50)
    actual, state = jax.jit(tx.update)(rounded[1], tx.init(rounded[0]), rounded[0], value=losses[0])
    expected, expected_state = update(exact[1], tx.init(exact[0]), exact[0], value=losses[0])
    for k in actual:
        assert actual[k].dtype == jnp.bfloat16
        assert_close(actual[k].astype(jnp.float32), expected[k], 1e-2)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    is_close = jax.tree.map(lambda x, y: np.allclose(x, y, rtol=1e-5), state, expected_state)
    assert jax.tree.all(is_close)


def test_sharded_params_give_the_result_of_unsharded_ones():
    script = Path(__file__).with_name("velo_sharded.py")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "sharded over 8" in process.stdout


def test_the_state_comes_back_from_orbax(small, tmp_path):
    tx, update, params, grads, losses = small
    _, state = update(grads[0], tx.init(params), params, value=losses[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert_equal(restored, state)


def test_works_inside_an_optax_chain(small):
    tx, update, params, grads, losses = small
    chained = optax.chain(
        tx,
        optax.add_decayed_weights(-0.1),
        optax.scale_by_schedule(lambda count: 0.5 / (1 + count)),
    )
    actual, _ = jax.jit(chained.update)(
        grads[0], chained.init(params), params, value=losses[0], other=2
    )
    plain, _ = update(grads[0], tx.init(params), params, value=losses[0])
    for k in actual:
        np.testing.assert_allclose(actual[k], 0.5 * (plain[k] - 0.1 * params[k]), rtol=1e-5)


def test_optax_can_map_over_the_params_in_the_state(small):
    tx, _, params, _, _ = small
    marked = optax.tree.map_params(tx, lambda x: x + 1.0, tx.init(params))
    assert_equal(marked.v, jax.tree.map(jnp.ones_like, params))
    assert int(marked.t) == 0


def test_absorb_writes_the_mean_memory_over_tensors_into_theta(small):
    tx, update, params, grads, losses = small
    _, state = update(grads[0], tx.init(params), params, value=losses[0])
    theta = velo().absorb(THETA, state)
    assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, THETA)
    start = tx.init(params)
    assert_equal(start.hidden, jnp.repeat(THETA["lstm_init_state"]["hidden"], 2, axis=0))
    for name in ("hidden", "cell"):
        expected = np.asarray(getattr(state, name)).mean(axis=0, keepdims=True)
        np.testing.assert_allclose(theta["lstm_init_state"][name], expected, rtol=1e-6)


def test_leaves_without_elements_are_passed_over(small):
    _, update, params, grads, losses = small
    tx = velo().apply(THETA, num_steps=50)
    with_empty = [{**tree, "a": jnp.zeros((0, 3))} for tree in (params, grads[0])]
    actual, state = jax.jit(tx.update)(
        with_empty[1], tx.init(with_empty[0]), with_empty[0], value=losses[0]
    )
    expected, _ = update(grads[0], tx.init(params), params, value=losses[0])
    assert actual.pop("a").shape == (0, 3) and int(state.skipped) == 0
    for k in expected:
        assert_close(actual[k], expected[k], 1e-6)
    nothing, state = tx.update({}, tx.init({}), {}, value=1.0)
    assert nothing == {} and int(state.t) == 1
    assert velo().absorb(THETA, state) is THETA


def test_init_has_the_published_layout():
    theta = velo().init(jax.random.key(0), {"any": jnp.zeros(3)})
    assert sum(x.size for x in jax.tree.leaves(theta)) == 2_320_385
    assert theta["rnn_params"]["rnn/linear"]["w"].shape == (1024, 2048)
    std = 0.88 / np.sqrt(1024)  # of a normal cut at two standard deviations
    np.testing.assert_allclose(jnp.std(theta["rnn_params"]["rnn/linear"]["w"]), std, rtol=0.01)
    bank = theta["ff_mod_stack"]["~"]
    assert bank["w0__13"].shape == (256, 3, 4)
    np.testing.assert_allclose(jnp.std(bank["w0__13"]), 0.88 / np.sqrt(30), rtol=0.05)
    assert not np.any(bank["b0"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tx, s, p: tx.update(p, s, p), "velo: update needs the loss .*`value`.*value=loss"),
        (lambda tx, s, p: tx.update(p, s, value=1.0), "velo: update needs `params`"),
        (lambda tx, s, p: tx.update(p, s, p, value=jnp.ones(2)), r"one number, got shape \(2,\)"),
        (lambda tx, s, p: tx.update({"w": p["w"]}, s, p, value=1.0), r"missing \['b'\]"),
        (lambda tx, s, p: tx.init({"n": jnp.arange(3)}), "velo: leaf 'n' has dtype int32"),
        (lambda tx, s, p: velo().apply(THETA), r"velo: apply needs .* num_steps=\.\.\."),
        (lambda tx, s, p: velo().apply(THETA, num_steps=0), "num_steps .* at least 1, got 0"),
        (lambda tx, s, p: velo().apply(THETA, num_steps=jnp.int32(-3)), "got -3"),
        (lambda tx, s, p: velo().apply(THETA, num_steps=2.5), "must be an integer, got 2.5"),
        (lambda tx, s, p: velo(0), "velo: hidden must be at least 1, got 0"),
        (lambda tx, s, p: velo(bank=-1), "velo: bank must be at least 1, got -1"),
        (lambda tx, s, p: velo().apply({"net": p}, num_steps=5), "velo: these are not VeLO's"),
    ],
)
def test_misuse_is_explained(small, call, message):
    tx, _, params, _, _ = small
    with pytest.raises(ValueError, match=message):
        call(tx, tx.init(params), params)
