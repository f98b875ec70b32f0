"""Hand-crafted baselines as learned optimizers that have nothing to learn (theta = {})."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt.core.checks import check_callable, check_number
from metaopt.core.trees import leaf_names
from metaopt.core.types import LearnedOptimizer


def power_decay(lr: float = 3.0, tau: float = 50_000.0, power: float = 1.5) -> optax.Schedule:
    """``lr / (t / tau + 1)^power`` with t = 0 at the first step (LGL2O, appendix E).

    Examples:
      >>> float(power_decay(4.0, tau=10.0, power=2.0)(10))
      1.0
    """
    return lambda count: lr / (count / tau + 1.0) ** power


def handcrafted(
    make: Callable[[int | None], optax.GradientTransformation],
) -> LearnedOptimizer:
    """Any optax transformation as a `LearnedOptimizer` with theta = {}.

    Args:
      make: ``num_steps -> transformation``; the horizon serves schedules that end (cosine).
    """

    check_callable("handcrafted: make", make)

    def apply(theta, *, num_steps=None):
        del theta
        return optax.with_extra_args_support(make(num_steps))

    return LearnedOptimizer(init=lambda key, params: {}, apply=apply)


def sgd(
    lr: float = 3.0, *, tau: float | None = 50_000.0, momentum: float | None = None
) -> LearnedOptimizer:
    """SGD with LGL2O's decay ``lr / (t / tau + 1)^1.5``; ``tau=None`` keeps the rate constant."""
    _check_rate("sgd", lr)
    if tau is not None:
        check_number("sgd: tau", tau, above=0)
    if momentum is not None:
        check_number("sgd: momentum", momentum, least=0, below=1)
    schedule = lr if tau is None else power_decay(lr, tau)
    return handcrafted(lambda num_steps: optax.sgd(schedule, momentum=momentum))


def cosine_decay(lr: Any, num_steps: Any) -> optax.Schedule:
    """From lr to zero along half a cosine. Unlike optax's, lr and num_steps may be traced."""
    return lambda count: lr * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))


def _check_rate(name: str, lr: Any) -> None:
    if not isinstance(lr, jax.Array):  # of traced ones nothing is known
        check_number(f"{name}: lr", lr, least=0)


def _rate(lr: Any, schedule: str, num_steps: Any) -> Any:
    if schedule == "constant":
        return lr
    if schedule != "cosine":
        raise ValueError(f"schedule must be 'constant' or 'cosine', got {schedule!r}.")
    if num_steps is None:
        raise ValueError("schedule='cosine' needs `num_steps`: apply(theta, num_steps=...).")
    return cosine_decay(lr, num_steps)


def adam(lr: Any = 1e-3, *, schedule: str = "constant") -> LearnedOptimizer:
    """Adam with a constant rate, or a cosine that reaches zero at `num_steps`."""
    _check_rate("adam", lr)
    return handcrafted(lambda num_steps: optax.adam(_rate(lr, schedule, num_steps)))


def adamw(
    lr: Any = 1e-3, *, weight_decay: float = 1e-4, schedule: str = "constant"
) -> LearnedOptimizer:
    """AdamW: Adam with decoupled weight decay."""
    _check_rate("adamw", lr)
    check_number("adamw: weight_decay", weight_decay)
    return handcrafted(
        lambda num_steps: optax.adamw(_rate(lr, schedule, num_steps), weight_decay=weight_decay)
    )


def head_only(
    tx: optax.GradientTransformation, is_head: Callable[[str], bool]
) -> optax.GradientTransformationExtraArgs:
    """`tx` on the leaves of the head; all others stay as they are (`optax.partition`).

    Args:
      tx: any transformation; its state covers the head alone. A hand-crafted one:
        ``head_only(adam(1e-3).apply({}), lambda name: name.startswith("head/"))``.
      is_head: leaf name (``"head/kernel"``) -> whether it is trained.

    Raises: ValueError: at `init` and `update`, where no leaf is part of the head.
    """

    check_callable("head_only: is_head", is_head)

    def labels(params):
        names = leaf_names(params)
        chosen = ["head" if is_head(name) else "rest" for name in names]
        if "head" not in chosen:
            raise ValueError(f"head_only: is_head is true of none of the leaves {names}.")
        return jax.tree.unflatten(jax.tree.structure(params), chosen)

    return optax.partition({"head": tx, "rest": optax.set_to_zero()}, labels)
