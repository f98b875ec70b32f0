"""Hand-crafted baselines as learned optimizers that have nothing to learn (theta = {})."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaopt.core.checks import check_callable, check_number
from metaopt.core.trees import leaf_names
from metaopt.core.types import LearnedOptimizer


def handcrafted(
    make: Callable[[int | None], optax.GradientTransformation],
) -> LearnedOptimizer:
    """Makes a `LearnedOptimizer` with theta = {} of any optax transformation.

    Args:
      make: ``num_steps -> transformation``. Schedules that end, such as a cosine, need the
        horizon `num_steps`.

    Returns:
      The optimizer.

    Raises:
      ValueError: when `make` is no function.
    """
    check_callable("handcrafted: make", make)

    def apply(theta, *, num_steps=None):
        del theta
        return optax.with_extra_args_support(make(num_steps))

    return LearnedOptimizer(init=lambda key, params: {}, apply=apply)


def power_decay(lr: float = 3.0, tau: float = 50_000.0, power: float = 1.5) -> optax.Schedule:
    r"""LGL2O's learning rate for SGD.

    .. math:: \eta_t = \mathrm{lr} / (t / \tau + 1)^{\mathrm{power}}

    Args:
      lr: rate of the first step, for which t = 0.
      tau: number of steps after which the rate has fallen by a factor of ``2^power``.
      power: exponent of the decay.

    Returns:
      The schedule ``t -> rate``.

    Examples:
      >>> float(power_decay(4.0, tau=10.0, power=2.0)(10))
      1.0

    References:
      Premont-Schwarz et al., [A Simple Guard for Learned Optimizers](
      https://arxiv.org/abs/2201.12426), appendix E
    """
    return lambda count: lr / (count / tau + 1.0) ** power


def cosine_decay(lr: Any, num_steps: Any) -> optax.Schedule:
    """A learning rate that falls to zero along half a cosine.

    Args:
      lr: rate of the first step. Unlike that of optax's schedule, it may be traced.
      num_steps: step at which the rate is zero; it may be traced.

    Returns:
      The schedule ``t -> rate``.
    """
    return lambda count: lr * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(count / num_steps, 1.0)))


def sgd(
    lr: float = 3.0, *, tau: float | None = 50_000.0, momentum: float | None = None
) -> LearnedOptimizer:
    """SGD with the learning rate of `power_decay`.

    Args:
      lr: rate of the first step.
      tau: see `power_decay`; None keeps the rate constant.
      momentum: decay of the momentum, in [0, 1), or None.

    Returns:
      The optimizer.

    Raises:
      ValueError: when an argument is out of range.
    """
    _check_lr("sgd", lr)
    if tau is not None:
        check_number("sgd: tau", tau, above=0)
    if momentum is not None:
        check_number("sgd: momentum", momentum, least=0, below=1)
    schedule = lr if tau is None else power_decay(lr, tau)
    return handcrafted(lambda num_steps: optax.sgd(schedule, momentum=momentum))


def adam(lr: Any = 1e-3, *, schedule: str = "constant") -> LearnedOptimizer:
    """Adam.

    Args:
      lr: rate of the first step; it may be traced.
      schedule: "constant", or "cosine" for `cosine_decay` over `num_steps`.

    Returns:
      The optimizer; its `apply` needs `num_steps` with the schedule "cosine".

    Raises:
      ValueError: when an argument is out of range; at `apply`, when `num_steps` is missing.
    """
    _check_lr("adam", lr)
    _check_schedule("adam", schedule)
    return handcrafted(lambda num_steps: optax.adam(_schedule("adam", lr, schedule, num_steps)))


def adamw(
    lr: Any = 1e-3, *, weight_decay: float = 1e-4, schedule: str = "constant"
) -> LearnedOptimizer:
    """AdamW: Adam with decoupled weight decay.

    Args:
      lr: see `adam`.
      weight_decay: factor on the weights, as in `optax.adamw`.
      schedule: see `adam`.

    Returns:
      The optimizer; its `apply` needs `num_steps` with the schedule "cosine".

    Raises:
      ValueError: when an argument is out of range; at `apply`, when `num_steps` is missing.
    """
    _check_lr("adamw", lr)
    _check_schedule("adamw", schedule)
    check_number("adamw: weight_decay", weight_decay)

    def make(num_steps):
        rate = _schedule("adamw", lr, schedule, num_steps)
        return optax.adamw(rate, weight_decay=weight_decay)

    return handcrafted(make)


def _check_lr(name: str, lr: Any) -> None:
    if not isinstance(lr, jax.Array):  # an array may be traced and have no value yet
        check_number(f"{name}: lr", lr, least=0)


def _check_schedule(name: str, schedule: Any) -> None:
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"{name}: schedule must be 'constant' or 'cosine', got {schedule!r}.")


def _schedule(name: str, lr: Any, schedule: str, num_steps: Any) -> Any:
    if schedule == "constant":
        return lr
    if num_steps is None:
        raise ValueError(
            f"{name}: schedule='cosine' needs `num_steps`: apply(theta, num_steps=...)."
        )
    return cosine_decay(lr, num_steps)


def head_only(
    tx: optax.GradientTransformation, is_head: Callable[[str], bool]
) -> optax.GradientTransformationExtraArgs:
    """Applies `tx` to the leaves of the head and leaves all others as they are.

    Args:
      tx: any transformation; its state covers the head alone. With a hand-crafted optimizer:
        ``head_only(adam(1e-3).apply({}), lambda name: name.startswith("head/"))``.
      is_head: leaf name, such as ``"head/kernel"`` -> whether the leaf is trained.

    Returns:
      A transformation made with `optax.partition`.

    Raises:
      ValueError: when `is_head` is no function; at `init` and `update`, when no leaf is part of
        the head.
    """
    check_callable("head_only: is_head", is_head)

    def labels(params):
        names = leaf_names(params)
        chosen = ["head" if is_head(name) else "rest" for name in names]
        if "head" not in chosen:
            raise ValueError(f"head_only: is_head is true of none of the leaves {names}.")
        return jax.tree.unflatten(jax.tree.structure(params), chosen)

    return optax.partition({"head": tx, "rest": optax.set_to_zero()}, labels)
