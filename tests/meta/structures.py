"""Tasks of different structure and an optimizer whose losses are known in closed form."""

import jax.numpy as jnp

from metaopt.core.types import LearnedOptimizer, Task, TaskFamily, single
from metaopt.optimizers import sgd


def geometric() -> tuple[LearnedOptimizer, jnp.ndarray]:
    """Each step multiplies params by theta, whatever the gradient; theta = 0.5."""

    def apply(theta, *, num_steps=None):
        tx = sgd(0.0, tau=None).apply({})
        return tx._replace(update=lambda g, s, p=None, **extra: ((theta - 1.0) * p, s))

    return LearnedOptimizer(lambda key, params: jnp.float32(0.5), apply), jnp.float32(0.5)


def falling(start: float, size: int) -> TaskFamily:
    """loss = mean(x) of `size` numbers that begin at `start`: start * theta^t after t steps."""
    return single(
        Task(
            init=lambda key: jnp.full(size, start),
            loss=lambda params, batch: jnp.mean(params),
            sample=lambda key, shape, split="train": jnp.zeros((*shape, 1)),
            whole=lambda split="test": jnp.zeros(1),
        )
    )
