"""Every optimizer and every guard, and loops that `optax.adam` passes, for test_switches.py.

As a script with two devices, it runs these loops on them, and prints their faults as JSON.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from metaopt import guards, optimizers
from metaopt.core.types import LearnedOptimizer

PARAMS = {"b": np.float32([0.5, -0.5]), "w": np.linspace(-1.0, 1.0, 8, dtype=np.float32)}
PARAMS["w"] = PARAMS["w"].reshape(4, 2)
NUM_STEPS = 4
LEARNED = {
    "lstm": lambda: optimizers.lstm(hidden=2, layers=1),
    "l3rs": lambda: optimizers.l3rs(hidden=(2,)),
    "velo": lambda: optimizers.velo(hidden=4, bank=2, warn_past_horizon=False),
    "celo": lambda: optimizers.celo(hidden=4, warn_past_horizon=False),
    "celo_adam": lambda: optimizers.celo_adam(hidden=4, warn_past_horizon=False),
    "celo2": optimizers.celo2_adamw,
    "adafac_mlp": optimizers.adafac_mlp,
}
FALLBACK = optax.sgd(0.1, momentum=0.5)
# A meta-guard of an LSTM takes seconds to compile; it is traced only.
FAMILY = LearnedOptimizer(
    init=lambda key, params: np.float32([0.5, -0.1]),
    apply=lambda theta, *, num_steps=None: optax.chain(
        optax.trace(theta[0]), optax.scale(theta[1])
    ),
)
GUARDS: dict[str, Callable[[], Any]] = {
    "gl2o": lambda: guards.gl2o(learned("lstm"), FALLBACK),
    "lgl2o": lambda: guards.lgl2o(learned("lstm"), FALLBACK, n_t=1, n_c=1),
    "race": lambda: guards.race(learned("lstm"), FALLBACK, n_t=1),
    "race_held_out": lambda: guards.race(learned("lstm"), FALLBACK, n_t=1, n_c=1),
    "smg": lambda: guards.smg(FAMILY, np.float32([0.5, -0.1]), n_t=1, n_c=1),
    "amg": lambda: guards.amg(FAMILY, np.float32([0.5, -0.1]), n_t=1, n_c=1),
    "smg_lstm": lambda: guards.smg(LEARNED["lstm"](), theta_of("lstm"), n_t=1, n_c=1),
    "amg_lstm": lambda: guards.amg(LEARNED["lstm"](), theta_of("lstm"), n_t=1, n_c=1),
}
NAMES = ("adam", *LEARNED, "late", "random", *GUARDS)


@functools.cache
def theta_of(name: str) -> Any:
    """Meta-parameters with nothing at zero, in float32 whatever the switch."""
    shapes = jax.eval_shape(lambda: LEARNED[name]().init(jax.random.key(0), PARAMS))
    rng = np.random.default_rng(0)
    draw = lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
    return jax.tree.map(draw, shapes)


def learned(name: str) -> Any:
    return LEARNED[name]().apply(jax.tree.map(jnp.asarray, theta_of(name)), num_steps=20)


def contender(name: str) -> Any:
    if name == "adam":
        return optax.with_extra_args_support(optax.adam(0.1))
    if name in optimizers.ADVERSARIES:
        return optax.with_extra_args_support(optimizers.ADVERSARIES[name].apply({}))
    return GUARDS[name]() if name in GUARDS else learned(name)


def loss(params: Any, batch: jax.Array) -> jax.Array:
    return sum((jnp.mean(jnp.square(leaf - batch)) for leaf in jax.tree.leaves(params)), 0 * batch)


def step(tx: Any, params: Any, state: Any, value_fn: Callable) -> tuple[Any, Any]:
    """One step, as the documentation has it: a guard takes its gradients itself."""
    if isinstance(tx, guards.Guard):
        updates, state = tx.update(None, state, params, value_fn=value_fn)
    else:
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=value_fn)
    return optax.apply_updates(params, updates), state


def batches(dtype: Any = np.float32) -> Any:
    """One number for each step and device."""
    return np.linspace(0.5, 1.0, 2 * NUM_STEPS, dtype=dtype).reshape(NUM_STEPS, 2)


def call(tx: Any, loss: Callable = loss) -> Callable:
    """``(params, state, batch) -> params, state``."""
    return lambda params, state, batch: step(tx, params, state, lambda p: loss(p, batch))


def run(call: Callable, tx: Any, params: Any, steps: Any) -> Any:
    """Params after all steps."""
    state = tx.init(params)
    for batch in steps:
        params, state = call(params, state, batch)
    return params


def replica(tx: Any) -> Callable:
    """`call` of one of several replicas along the axis "d", each with a mini-batch of its own."""
    mean_loss = lambda params, batch: jax.lax.pmean(loss(params, batch.sum()), "d")
    return call(tx, mean_loss)


################################################################################
# Two devices
################################################################################


def on_one_device(tx: Any) -> Any:
    both = lambda params, batch: 0.5 * (loss(params, batch[0]) + loss(params, batch[1]))
    return run(jax.jit(call(tx, both)), tx, PARAMS, batches())


def split(tx: Any, kind: AxisType) -> Any:
    """Params that are split over the devices."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        halves = NamedSharding(mesh, PartitionSpec("d"))
        params = {name: jax.device_put(leaf, halves) for name, leaf in PARAMS.items()}
        both = lambda params, batch: 0.5 * (loss(params, batch[0]) + loss(params, batch[1]))
        params = run(jax.jit(call(tx, both)), tx, params, batches())
        if kind == AxisType.Explicit:
            assert all(leaf.sharding.spec[0] == "d" for leaf in params.values()), params
        return jax.device_get(params)


def in_shard_map(tx: Any) -> Any:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("d")
    mapped = jax.shard_map(
        replica(tx), mesh=mesh, in_specs=(whole, whole, split), out_specs=(whole, whole)
    )
    params = run(jax.jit(mapped), tx, PARAMS, batches())
    for leaf in jax.tree.leaves(params):
        first, second = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        np.testing.assert_array_equal(second, first)
    return params


def in_pmap(tx: Any) -> Any:
    """As `in_shard_map`; inside of `pmap` the gradients must be averaged, too."""

    def mean_loss(params, batch):
        return jax.lax.pmean(loss(with_mean_gradient(params), batch), "d")

    mapped = jax.pmap(call(tx, mean_loss), axis_name="d")
    twice = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)
    params, state = twice(PARAMS), twice(tx.init(PARAMS))
    for batch in batches():
        params, state = mapped(params, state, batch)
    for leaf in jax.tree.leaves(params):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    return jax.tree.map(lambda leaf: leaf[0], params)


@jax.custom_vjp
def with_mean_gradient(params: Any) -> Any:
    return params


with_mean_gradient.defvjp(
    lambda params: (params, None), lambda _, grads: (jax.lax.pmean(grads, "d"),)
)


# What the types of a traced program show already is run for few contenders.
WAYS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "auto": (lambda tx: split(tx, AxisType.Auto), ("lstm", "l3rs", "race")),
    "explicit": (lambda tx: split(tx, AxisType.Explicit), ("adam", "lstm", "celo2", "race", "smg")),
    "shard_map": (in_shard_map, ("adam", "race")),
    "pmap": (in_pmap, ("adam", "gl2o", "lgl2o", "race", "smg", "amg")),
}
ROWS = [(way, name) for way, (_, names) in WAYS.items() for name in names]


def fault_of(way: str, name: str) -> str:
    """What goes wrong on two devices; an empty text where nothing does."""
    try:
        for k, leaf in WAYS[way][0](contender(name)).items():
            np.testing.assert_allclose(leaf, expected_of(name)[k], rtol=1e-4, atol=1e-6)
            assert np.any(leaf != PARAMS[k]), f"{k} did not move"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:2000]
    return ""


@functools.cache
def expected_of(name: str) -> Any:
    return on_one_device(contender(name))


if __name__ == "__main__":
    assert jax.device_count() == 2
    print(json.dumps({f"{way}-{name}": fault_of(way, name) for way, name in ROWS}))
