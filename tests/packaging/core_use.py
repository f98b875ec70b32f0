"""What works with the core's dependencies alone: load, guard, take a step, save.

The tests run it in a process that hides all other packages; the continuous integration runs it in
an environment that has the wheel and nothing else.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import datasets, guards, tasks


def main() -> None:
    task = tasks.quadratic(4)
    exported = metaopt.load("lstm-mlp-mnist")
    guard = guards.race(exported.apply(num_steps=10), optax.adam(1e-2), n_t=2)
    params = task.init(jax.random.key(0))

    @jax.jit
    def step(state, batch):
        return guard.update(None, state, params, value_fn=lambda p: task.loss(p, batch))

    updates, _ = step(guard.init(params), task.sample(jax.random.key(1), ()))
    assert jnp.isfinite(updates).all() and jnp.any(updates != 0)

    with tempfile.TemporaryDirectory() as folder:
        path = metaopt.save(Path(folder), exported.settings, exported.theta)
        equal = jax.tree.map(jnp.array_equal, metaopt.load(path).theta, exported.theta)
    assert jax.tree.all(equal)
    assert datasets.spirals(60).splits["train"]["x"].shape[1:] == (2,)
    print("the core works:", metaopt.__file__)


if __name__ == "__main__":
    main()
