"""JAX's own switches: every optimizer and every guard passes wherever `optax.adam` does.

`optax.adam` is a row of each test, which shows that the loop itself is right. Where a switch shows
while a program is traced, nothing is compiled.
"""

import collections
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import contenders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contenders import NAMES, PARAMS, batches, call, contender, replica
from jax.experimental import io_callback
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from metaopt.optimizers.velo_features import Factored

COMPILED = [name for name in NAMES if not name.endswith("_lstm")]


def dtypes_of(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


@pytest.mark.parametrize("params_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
def test_enable_x64_changes_no_dtype(name, params_dtype):
    """Not that of params, and not that of a state, which a loop could not carry."""
    with jax.enable_x64(True):
        tx = contender(name)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, params_dtype), PARAMS)
        state = jax.eval_shape(tx.init, params)
        after = jax.eval_shape(call(tx), params, state, params["b"][0])
        assert dtypes_of(after) == dtypes_of((params, state))


@pytest.mark.parametrize("name", NAMES)
def test_rank_promotion_and_strict_dtype_promotion(name):
    """`optax.adam`, which celo2 contains, raises a float to an integer power."""
    strict = "standard" if name in ("adam", "celo2") else "strict"
    tx = contender(name)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion(strict):
        state = jax.eval_shape(tx.init, PARAMS)
        jax.eval_shape(call(tx), PARAMS, state, PARAMS["b"][0])


@pytest.mark.parametrize("name", COMPILED)
def test_debug_nans_an_ordered_host_callback_in_the_loss_and_full_counters(name):
    """Counters at 2^31 - 1 stay there; all three in one program, since compiling takes the time."""
    losses = []

    def loss(params, batch):
        value = contenders.loss(params, batch)
        io_callback(losses.append, None, jax.lax.stop_gradient(value), ordered=True)
        return value

    tx, steps = contender(name), batches()[:, 0]
    program = jax.jit(call(tx, loss))
    with jax.debug_nans(True), warnings.catch_warnings():
        params, state = PARAMS, tx.init(PARAMS)
        for batch in steps:
            params, state = program(params, state, batch)
        warnings.simplefilter("ignore")  # past the horizon
        full = jax.tree_util.tree_map_with_path(fill_counter, state)
        for batch in steps:
            params, full = program(params, full, batch)
    jax.effects_barrier()
    assert len(losses) >= 2 * len(steps) and np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(full):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            assert np.all(leaf >= -1), jax.tree_util.keystr(path)  # -1 is no winner
            if field_of(path) in {"t", "windows", "gradient_evals"}:
                assert leaf == 2**31 - 1, jax.tree_util.keystr(path)


COUNTERS = {
    *("t", "skipped", "count", "terms"),  # of optimizers and gl2o
    *("windows", "wins", "kept_start", "gradient_evals", "loss_evals", "lost", "spent", "missed"),
}


def fill_counter(path, leaf):
    return jnp.full_like(leaf, 2**31 - 1) if field_of(path) in COUNTERS else leaf


def field_of(path):
    return getattr(path[-1], "name", "") if path else ""


@pytest.mark.parametrize("name", NAMES)
def test_complex_params_are_optimized_as_in_optax_or_refused_by_name(name):
    params = {"w": jnp.ones(2), "z": jnp.array([1.0 + 2.0j, complex(0.0, np.inf)])}
    if name in ("adam", "late", "random"):
        tx = contender(name)
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates["z"].dtype == params["z"].dtype
    else:
        with pytest.raises(ValueError, match=r"leaf 'z' has dtype complex64.*as two leaves"):
            contender(name).init(params)


@pytest.mark.parametrize("name", NAMES)
def test_tree_map_params_finds_the_leaves_that_belong_to_params(name):
    """Such as to split a state over devices as the params are split."""
    tx = contender(name)
    mapped = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, key: key,
        tx.init(PARAMS),
        {key: key for key in PARAMS},
        transform_non_params=lambda _: "other",
        is_leaf=lambda node: isinstance(node, Factored | optax.MaskedNode),
    )
    numbers = collections.Counter(jax.tree.leaves(mapped))
    assert numbers["b"] == numbers["w"] == NUM_PARAM_TREES[name]
    assert set(numbers) <= {"b", "w", "other"}


# Moments, factored ones as one tree; params of runners and pairs, and rows of their gradients.
NUM_PARAM_TREES = {
    **{"adam": 2, "lstm": 0, "l3rs": 2, "velo": 5, "celo": 5, "celo_adam": 2, "celo2": 7},
    **{"adafac_mlp": 5, "late": 0, "random": 0, "gl2o": 1, "lgl2o": 4, "race": 3},
    **{"race_held_out": 3, "smg": 10, "amg": 8, "smg_lstm": 7, "amg_lstm": 6},
}


def mesh_of(kind: AxisType) -> AbstractMesh:
    return AbstractMesh((2,), ("d",), axis_types=(kind,))


@pytest.mark.parametrize("name", NAMES)
def test_explicit_axes_of_a_mesh(name):
    """Params stay split as they are."""
    axis = NAMES.index(name) % 2
    tx, mesh = contender(name), mesh_of(AxisType.Explicit)
    with jax.sharding.use_abstract_mesh(mesh):
        spec_of = {"w": PartitionSpec(*[None] * axis, "d"), "b": PartitionSpec("d")}
        params = {
            k: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec_of[k])
            )
            for k, leaf in PARAMS.items()
        }
        state = jax.eval_shape(tx.init, params)
        after, state = jax.eval_shape(call(tx), params, state, PARAMS["b"][0])
        after, _ = jax.eval_shape(call(tx), after, state, PARAMS["b"][0])
    assert after["w"].sharding.spec[axis] == "d" and after["b"].sharding.spec[0] == "d"


@pytest.mark.parametrize("name", NAMES)
def test_replicas_in_shard_map_are_equal(name):
    """By their types: an output that is declared to be equal on all devices must be so."""
    tx, whole, split = contender(name), PartitionSpec(), PartitionSpec("d")
    mapped = jax.shard_map(
        replica(tx),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(whole, whole, split),
        out_specs=(whole, whole),
    )
    jax.eval_shape(mapped, PARAMS, jax.eval_shape(tx.init, PARAMS), PARAMS["b"])


@pytest.fixture(scope="module")
def faults_on_two_devices() -> dict[str, str]:
    process = subprocess.run(
        [sys.executable, str(Path(contenders.__file__))],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("row", contenders.ROWS, ids="-".join)
def test_two_devices_give_the_result_of_one(row, faults_on_two_devices):
    """Replicas in `shard_map` and `pmap` are equal bit for bit."""
    assert faults_on_two_devices["-".join(row)] == ""
