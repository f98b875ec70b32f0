# pyright: strict, reportUnknownMemberType=false, reportMissingTypeStubs=false
"""What a user writes against the public API; `make test` checks its types strictly."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import metaopt
from metaopt import guards, meta, optimizers, tasks


def loss_fn(params: jax.Array, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(params - batch))


def guarded_training(folder: str) -> jax.Array:
    learned = metaopt.load(folder).apply(num_steps=100)
    guard = guards.race(learned, optax.adam(1e-2))
    params = jnp.zeros(3)
    state = guard.init(params)
    for batch in jnp.ones((100, 8, 3)):

        def value_fn(params: jax.Array, batch: jax.Array = batch) -> jax.Array:
            return loss_fn(params, batch)

        updates, state = guard.update(None, state, params, value_fn=value_fn)
        params = jnp.asarray(optax.apply_updates(params, updates))
    return params


def in_windows(params: jax.Array) -> jax.Array:
    guard = guards.race(optax.lion(1e-2), optax.adam(1e-2), n_t=5, n_c=5)
    tx = guards.in_windows(guard)
    state = tx.init(params)
    batches = (jnp.ones((8, 3)) for _ in range(100))
    for train, held_out in metaopt.windows(batches, *guard.window):
        updates, state = tx.update(
            None, state, params, loss_fn=loss_fn, train_batches=train, eval_batches=held_out
        )
        params = jnp.asarray(optax.apply_updates(params, updates))
    return params


def meta_training(steps: int) -> Any:
    task = tasks.quadratic(3)
    learned = optimizers.l3rs(("sgd", "adam"), variant="none")
    theta = learned.init(jax.random.key(0), task.init(jax.random.key(1)))
    config = meta.NESConfig(population=4, min_steps=5, max_steps=5)
    trainer = meta.nes(learned, metaopt.single(task), config)
    state = trainer.init(jax.random.key(2), theta)
    for key in jax.random.split(jax.random.key(3), steps):
        state, _ = trainer.step(key, state)
    return trainer.theta(state)


def per_step(grads: jax.Array, value: jax.Array) -> jax.Array:
    tx = optimizers.velo(8, 4)
    theta = tx.init(jax.random.key(0), grads)
    transformation = tx.apply(theta, num_steps=10)
    state = transformation.init(grads)
    updates, _ = transformation.update(grads, state, grads, value=value)
    return jnp.asarray(updates)


def guarded_chain() -> optax.GradientTransformationExtraArgs:
    guard = guards.lgl2o(optax.sgd(0.1), optax.adam(1e-3), adaptive=guards.Adaptive(cap=40))
    return optax.chain(guard)


def statistics(params: jax.Array, batch_stats: Any) -> Any:
    state = guards.race(optax.sgd(0.1), optax.adam(1e-3)).init(params, batch_stats)
    return guards.model_state(state)
