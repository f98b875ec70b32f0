"""Compares runs with and without sharded params; test_sharded.py starts it with 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from metaopt import guards, optimizers
from metaopt.core.rollouts import unroll

SPECS = {"w": PartitionSpec("x", None), "k": PartitionSpec(None, "x")}
SHAPES = {"w": (16, 6), "k": (3, 8)}
STEPS = 5


def loss(params, batch):
    return sum(jnp.mean((leaf - batch) ** 2) for leaf in jax.tree.leaves(params))


def learned(name):
    lopt = {"lstm": lambda: optimizers.lstm(4), "l3rs": optimizers.l3rs}[name]()
    theta = lopt.init(jax.random.key(0), start())
    noise = lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)
    return lopt.apply(jax.tree.map(noise, theta), num_steps=10)


def start():
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def stepwise(name):
    tx = learned(name)

    def run(params, batches):
        return unroll(tx, params, tx.init(params), loss, batches)[:2]

    return run


def guarded(params, batches):
    guard = guards.race(learned("lstm"), optax.adam(0.1), n_t=2, n_c=1)
    return unroll(guard, params, guard.init(params), loss, batches)[:2]


def main():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    batches = jnp.linspace(-1.0, 1.0, STEPS)
    for name, run in {
        "lstm": stepwise("lstm"),
        "l3rs": stepwise("l3rs"),
        "race": guarded,
    }.items():
        # Results get the sharding of the params, as in a training loop with sharded params.
        expected = jax.jit(run)(start(), batches)
        program = jax.jit(
            lambda p, b, run=run: jax.lax.with_sharding_constraint(run(p, b)[0], shardings)
        )
        actual = program(jax.device_put(start(), shardings), batches)
        for k in SHAPES:
            np.testing.assert_allclose(actual[k], expected[0][k], rtol=2e-5, atol=1e-6)
            assert np.any(expected[0][k] != start()[k])
            assert actual[k].sharding.is_equivalent_to(shardings[k], actual[k].ndim), (name, k)
        print(f"{name}: sharded over {jax.device_count()} devices")


if __name__ == "__main__":
    main()
