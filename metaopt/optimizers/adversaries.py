"""Useless learned optimizers, against which guards are tested."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from metaopt.core.types import LearnedOptimizer
from metaopt.optimizers.handcrafted import handcrafted


def _constant(value: float) -> Callable[[], optax.GradientTransformation]:
    """Proposes `value` for every parameter."""
    return lambda: optax.stateless(lambda updates, params: optax.tree.full_like(updates, value))


def _random() -> optax.GradientTransformation:
    """Steps of length 1 in random directions."""

    def update(updates, state, params=None):
        del params
        key, k_step = jax.random.split(state)
        step = optax.tree.random_like(k_step, updates)
        return optax.tree.scale(1.0 / optax.tree.norm(step), step), key

    return optax.GradientTransformation(lambda params: jax.random.key(0), update)


def _late() -> optax.GradientTransformation:
    """SGD for 30 steps, then up the gradient: it has earned trust before."""
    return optax.sgd(lambda count: jnp.where(jnp.less(count, 30), 0.3, -1.0))


_MAKE: dict[str, Callable[[], optax.GradientTransformation]] = {
    "nan": _constant(jnp.nan),
    "inf": _constant(jnp.inf),
    "huge": _constant(1e30),
    "ascent": lambda: optax.sgd(-1.0),
    "random": _random,
    "late": _late,
}
# Name -> what it proposes: NaN, infinity, 1e30, gradient ascent, random steps, late ascent.
ADVERSARIES: dict[str, LearnedOptimizer] = {
    name: handcrafted(lambda num_steps, make=make: make()) for name, make in _MAKE.items()
}
