"""Quadratics with known constants."""

import jax
import jax.numpy as jnp

from metaopt.core.checks import check_number
from metaopt.core.types import Batch, Key, Split, Task
from metaopt.tasks.scores import at_least_one


def quadratic(
    dim: int = 8, *, condition: float = 10.0, noise: float = 0.1, largest: float = 1.0
) -> Task:
    """``F(x) = sum(h * x^2) / 2 + batch . x``: strongly convex with known constants.

    Eigenvalues h are spaced geometrically in ``[largest / condition, largest]``, so that
    L = `largest` and mu = ``largest / condition``. A batch is a vector ``[dim]`` of noise; `whole`
    is the noiseless batch, for which the minimum is 0 at x = 0.

    Args:
      dim: size of x.
      condition: L / mu, at least 1.
      noise: standard deviation of a batch.
      largest: L.

    Raises:
      ValueError: an argument is out of range.

    Examples:
      >>> task = quadratic(2, condition=4.0)
      >>> float(task.loss(jnp.array([2.0, 1.0]), task.whole()))  # (4 / 4 + 1) / 2
      1.0
    """
    at_least_one("quadratic", dim=dim)
    check_number("quadratic: condition", condition, least=1)
    check_number("quadratic: noise", noise, least=0)
    check_number("quadratic: largest", largest, above=0)
    h = largest * jnp.geomspace(1.0 / condition, 1.0, dim)

    def sample(key: Key, shape: tuple[int, ...], split: Split = "train") -> Batch:
        del split
        return noise * jax.random.normal(key, (*shape, dim))

    return Task(
        init=lambda key: jax.random.normal(key, (dim,)),
        loss=lambda x, batch: 0.5 * jnp.sum(h * x**2) + jnp.vdot(batch, x),
        sample=sample,
        whole=lambda split="test": jnp.zeros(dim),
    )
