"""Compares VeLO on sharded params with a reference; test_velo.py starts it with 8 devices."""

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from velo_reference import random_theta, replay

from metaopt.optimizers.layouts import theta_from_named
from metaopt.optimizers.velo import velo

SPECS = {"w": PartitionSpec("x", None), "k": PartitionSpec(None, "x")}
SHAPES = {"w": (16, 6), "k": (3, 8)}


def main():
    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    draw = lambda: {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    start, grads, losses = draw(), [draw() for _ in range(3)], np.float32([1.0, 0.7, 0.9])
    flat = lambda tree: [tree[k] for k in SHAPES]
    named = random_theta(0)
    expected = replay(named, flat(start), [flat(g) for g in grads], losses, 10)[-1]
    tx = velo().apply(theta_from_named("velo", named), num_steps=10)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        shardings = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
        with jax.set_mesh(mesh):
            params = jax.device_put(start, shardings)
            state, update = tx.init(params), jax.jit(tx.update)
            for g, value in zip(grads, losses, strict=True):
                updates, state = update(jax.device_put(g, shardings), state, params, value=value)
                params = optax.apply_updates(params, updates)
        for k, x in zip(SHAPES, expected, strict=True):
            np.testing.assert_allclose(params[k], x, rtol=2e-5, atol=1e-6)
            for leaf in (params[k], state.v[k], state.momenta[0][k]):
                assert leaf.sharding.is_equivalent_to(shardings[k], leaf.ndim), (kind, k)
        print(f"sharded over {jax.device_count()} devices, {kind}")


if __name__ == "__main__":
    main()
