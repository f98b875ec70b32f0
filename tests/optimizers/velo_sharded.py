"""Run by test_velo.py in a process of its own that has 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from velo_reference import random_theta

from metaopt.optimizers.velo import velo
from metaopt.optimizers.velo_import import velo_theta_from_named

SPECS = {"w": PartitionSpec("x", None), "k": PartitionSpec(None, "x"), "b": PartitionSpec("x")}
SHAPES = {"w": (16, 6), "k": (3, 8), "b": (8,)}


def run(place):
    rng = np.random.default_rng(0)
    draw = lambda: place({k: jnp.asarray(rng.normal(size=s)) for k, s in SHAPES.items()})
    tx = velo().apply(velo_theta_from_named(random_theta(0)), num_steps=10)
    params = draw()
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(3):
        updates, state = update(draw(), state, params, value=jnp.float32(1.0 / (t + 1)))
        params = optax.apply_updates(params, updates)
    return params, state


def main():
    assert jax.device_count() == 8
    want, want_state = run(lambda tree: tree)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        shard = lambda k, x, mesh=mesh: jax.device_put(x, NamedSharding(mesh, SPECS[k]))
        with jax.set_mesh(mesh):
            got, state = run(lambda tree, shard=shard: {k: shard(k, x) for k, x in tree.items()})
        for x, y in zip(jax.tree.leaves((got, state)), jax.tree.leaves((want, want_state))):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-7)
        for k in SHAPES:
            assert len(state.v[k].sharding.device_set) == 8, (kind, k)
            assert not state.v[k].sharding.is_fully_replicated, (kind, k)
        print(f"sharded over {jax.device_count()} devices, {kind}")


if __name__ == "__main__":
    main()
