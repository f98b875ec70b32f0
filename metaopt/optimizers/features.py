"""What learned optimizers see: pure functions from gradients, statistics and time to inputs."""

import jax
import jax.numpy as jnp

_TINY = 1e-30  # keeps log and its derivative finite at a gradient of exactly zero


def log_sign(grad: jax.Array, p: float = 10.0) -> jax.Array:
    """Gradients ``[...]`` of any scale as two bounded-slope features ``[..., 2]``.

    .. math:: |g| \\ge e^{-p}: (\\log|g| / p, \\mathrm{sign}\\, g); \\quad
       |g| < e^{-p}: (-1, e^p g)

    Continuous at the threshold, odd in its second feature; zero maps to ``(-1, 0)``.

    References: Andrychowicz et al. 2016, appendix A (p = 10 there; 5 in their released code).
    """
    magnitude = jnp.abs(grad)
    large = magnitude >= jnp.exp(-p)
    log = jnp.log(jnp.maximum(magnitude, _TINY)) / p
    return jnp.stack(
        [jnp.where(large, log, -1.0), jnp.where(large, jnp.sign(grad), grad * jnp.exp(p))], axis=-1
    )
