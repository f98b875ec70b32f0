"""How an estimated gradient moves theta: schedules, the outer optimizer, ranks."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

MetaOptimizer: TypeAlias = Literal["adam", "sgd"]


def decayed(value: float, half_life: int) -> Callable[[Any], jax.Array]:
    """``value * 0.5^(generation / half_life)`` (L3RS, section 3.4; half_life 0: constant)."""
    if not half_life:
        return lambda generation: jnp.full_like(generation, value, dtype=jnp.float32)
    return lambda generation: value * 0.5 ** (jnp.asarray(generation, jnp.float32) / half_life)


def meta_optimizer(
    kind: MetaOptimizer,
    lr: Callable[[Any], jax.Array],
    *,
    weight_decay: float = 0.0,
    clip: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam or plain SGD with decoupled weight decay; its state keeps the norm of what it is given.

    Args:
      kind: "adam" or "sgd".
      lr: update -> learning rate.
      weight_decay: theta shrinks by ``lr * weight_decay`` per update.
      clip: bound on the norm of the gradient; 0 leaves it as it is.
    """
    return optax.chain(
        optax.snapshot("meta_grad_norm", optax.tree.norm),
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.scale_by_adam() if kind == "adam" else optax.identity(),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
        optax.scale_by_learning_rate(lr),
    )


def centered_ranks(losses: Float[Array, " n"]) -> jax.Array:
    """``rank / (n - 1) - 1/2`` of losses ``[n]``, ties averaged; exactly 0 where all are equal.

    evosax's own ``rank * (1 / (n - 1)) - 0.5`` leaves 6e-8 there, which Adam scales up.
    """
    n = losses.shape[0]
    ranks = jax.scipy.stats.rankdata(losses) - 1.0
    return (2.0 * ranks - (n - 1)) / (2.0 * (n - 1))


def population_metrics(
    losses: Float[Array, " n"], finite: Bool[Array, " n"]
) -> dict[str, jax.Array]:
    """Mean, best and spread of the finite ones of ``losses``, and how many are not."""
    return {
        "meta_loss": jnp.mean(losses, where=finite),
        "meta_loss_best": jnp.min(losses, initial=jnp.inf, where=finite),
        "meta_loss_std": jnp.std(losses, where=finite),
        "non_finite": jnp.sum(~finite),
    }


def strong(tree: Any) -> Any:
    """Arrays without weak types, which would make the second generation compile again."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.asarray(x).dtype), tree)
