"""Useless optimizers as learned optimizers, against which guards are tested."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from metaopt.core.types import LearnedOptimizer
from metaopt.optimizers.handcrafted import handcrafted


def _constant(value: float) -> optax.GradientTransformation:
    """Proposes `value` for every parameter."""
    return optax.stateless(lambda updates, params: optax.tree.full_like(updates, value))


def _random() -> optax.GradientTransformation:
    """Proposes steps of length 1 in random directions."""

    def init_fn(params):
        del params
        return jax.random.key(0)

    def update_fn(updates, state, params=None):
        del params
        new_key, k_step = jax.random.split(state)
        step = optax.tree.random_like(k_step, updates)
        return optax.tree.scale(1.0 / optax.tree.norm(step), step), new_key

    return optax.GradientTransformation(init_fn, update_fn)


def _late() -> optax.GradientTransformation:
    """Takes 30 steps of SGD, which earn trust, then ascends the gradient."""
    return optax.sgd(lambda count: jnp.where(jnp.less(count, 30), 0.3, -1.0))


def _adversary(make: Callable[[], optax.GradientTransformation]) -> LearnedOptimizer:
    return handcrafted(lambda num_steps: make())


# By name: the steps are NaN, infinity, 1e30, up the gradient, random, and late up the gradient.
ADVERSARIES: dict[str, LearnedOptimizer] = {
    "nan": _adversary(lambda: _constant(jnp.nan)),
    "inf": _adversary(lambda: _constant(jnp.inf)),
    "huge": _adversary(lambda: _constant(1e30)),
    "ascent": _adversary(lambda: optax.sgd(-1.0)),
    "random": _adversary(_random),
    "late": _adversary(_late),
}
