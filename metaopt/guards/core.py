"""What all guards share: their type, their diagnostics, the choice of a candidate, and checks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from metaopt.core.checks import check_integer, show
from metaopt.core.rollouts import check_window_call, scalar
from metaopt.core.trees import all_finite
from metaopt.core.types import Batch, LearnedOptimizer, LossFn, Params, transformation

################################################################################
# The form of a guard
################################################################################


class Process(NamedTuple):
    """A guard as phases over single mini-batches, from which `streaming` makes its second form.

    A window is a sequence of phases. `work` holds the intermediate values of a window: the
    candidates, their optimizer states and the validation losses so far.

    Attributes:
      start: ``(state, params) -> work`` at the beginning of a window.
      phases: one ``(work, index, value_fn) -> work`` per phase, called once per mini-batch with
        the index of the mini-batch in the phase.
      lengths: ``state -> int32 [phases]``, the mini-batches in each phase of the next window.
      decide: ``(state, params, work, lengths) -> (params, state)`` at the end of a window.
    """

    start: Callable[[Any, Params], Any]
    phases: tuple[Callable[[Any, jax.Array, Callable], Any], ...]
    lengths: Callable[[Any], jax.Array]
    decide: Callable[[Any, Params, Any, Any], tuple[Params, Any]]


class Work(NamedTuple):
    """The intermediate values of a window in a stream.

    They may be NaN or inf until the window is decided, so `became_nonfinite` skips this type.

    Attributes:
      value: what `Process.start` and `Process.phases` return.
    """

    value: Any


class Guard(optax.GradientTransformationExtraArgs):
    """An optax transformation in window form that also describes its streaming form.

    Attributes:
      init: ``params -> state``.
      update: ``(None, state, params, *, loss_fn, train_batches, eval_batches) -> updates, state``,
        one decision. A per-step guard has optax's own ``(grads, state, params, *, value_fn)``.
      window: ``(n_t, n_c)``, the training and validation mini-batches of the first window.
      process: the guard as phases over single mini-batches. A string explains why the guard has
        no streaming form. None: the guard is already a per-step transformation.
    """

    update: Callable[..., tuple[Any, Any]]  # type: ignore  # optax's wants gradients, not None
    window: tuple[int, int]
    process: Process | str | None

    def __new__(
        cls, init: Any, update: Any, window: tuple[int, int], process: Process | str | None
    ):
        self = super().__new__(cls, init, update)
        self.window, self.process = window, process
        return self


def inner_transformation(guard: str, role: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    """Checks a transformation inside a guard and makes its errors name the guard and the role.

    Args:
      guard: name of the guard.
      role: part of the transformation in the guard, for example ``"fallback"``.
      tx: the transformation.

    Returns:
      `tx` with support for extra args.

    Raises:
      ValueError: when `tx` cannot take single steps, such as a `LearnedOptimizer` without theta
        or a guard in window form.
      TypeError: at `update`, when `tx` requires an extra arg that guards do not pass.
    """
    if isinstance(tx, LearnedOptimizer):
        raise ValueError(
            f"{guard}: {role} is a LearnedOptimizer, a whole family; "
            "give one transformation of it: learned.apply(theta)."
        )
    if isinstance(tx, Guard) and tx.process is not None:
        raise ValueError(
            f"{guard}: {role} is a guard in window form, which cannot take single steps; "
            "nest guards as guards.streaming(guard)."
        )
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"{guard}: {role} must be an optax transformation, got {tx!r}.")
    wrapped = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        try:
            return wrapped.update(updates, state, params, **extra_args)
        except TypeError as error:
            if "keyword" not in str(error):
                raise
            raise TypeError(
                f"{guard}: the {role} transformation takes other extra args than a guard gives, "
                f"which are {', '.join(extra_args)}: {error}"
            ) from error

    return transformation(wrapped.init, update_fn)


################################################################################
# Diagnostics
################################################################################


class GuardInfo(NamedTuple):
    """Diagnostics of a guard, part of its state; read them with `optax.tree_utils.tree_get`.

    Attributes:
      accepted: bool ``[]``, whether the last decision took the learned optimizer's proposal.
      winner: int32 ``[]``, index of the candidate that the last decision took. It is -1 when no
        proposal was finite and the starting point stayed, and before the first decision.
      losses: float32 ``[k]``, mean validation losses of the k candidates at the last decision:
        +inf for a candidate that is not finite, NaN before the first decision.
      windows: int32 ``[]``, number of decisions so far.
      wins: int32 ``[k]``, number of decisions that each candidate won.
      kept_start: int32 ``[]``, number of decisions at which no proposal was finite and the
        starting point stayed.
      n_t: int32 ``[]``, training mini-batches of the next window.
      n_c: int32 ``[]``, validation mini-batches of the next window.
      gradient_evals: int32 ``[]``, gradients of the loss on one mini-batch that the guard has
        computed so far.
      loss_evals: int32 ``[]``, losses on one mini-batch, without gradient, that the guard has
        computed so far.
    """

    accepted: Bool[Array, ""]
    winner: Int[Array, ""]
    losses: Float[Array, " k"]
    windows: Int[Array, ""]
    wins: Int[Array, " k"]
    kept_start: Int[Array, ""]
    n_t: Int[Array, ""]
    n_c: Int[Array, ""]
    gradient_evals: Int[Array, ""]
    loss_evals: Int[Array, ""]


def init_info(num_candidates: int, n_t: int, n_c: int) -> GuardInfo:
    """Returns the diagnostics before the first decision."""
    # Each count is a buffer of its own, so that a state can be donated.
    count = lambda start=0: jnp.array(start, jnp.int32)
    return GuardInfo(
        accepted=jnp.array(False),
        winner=count(-1),
        losses=jnp.full(num_candidates, jnp.nan, jnp.float32),
        windows=count(),
        wins=jnp.zeros(num_candidates, jnp.int32),
        kept_start=count(),
        n_t=count(n_t),
        n_c=count(n_c),
        gradient_evals=count(),
        loss_evals=count(),
    )


def record_decision(
    info: GuardInfo,
    *,
    winner: Int[Array, ""],
    accepted: Bool[Array, ""],
    losses: Float[Array, " k"],
    kept_start: Bool[Array, ""],
    gradient_evals: Any,
    loss_evals: Any,
) -> GuardInfo:
    """Returns the diagnostics after one more decision.

    Args:
      info: the diagnostics before it.
      winner: see `GuardInfo`.
      accepted: see `GuardInfo`.
      losses: see `GuardInfo`.
      kept_start: whether the starting point stayed because no proposal was finite.
      gradient_evals: gradients that this decision took.
      loss_evals: losses that this decision took.
    """
    new_info = info._replace(
        accepted=accepted,
        winner=winner,
        losses=losses,
        windows=info.windows + 1,
        wins=info.wins + (jnp.arange(info.wins.size) == winner),
        kept_start=info.kept_start + kept_start,
        gradient_evals=info.gradient_evals + gradient_evals,
        loss_evals=info.loss_evals + loss_evals,
    )
    # Cast to the dtypes of before, which also strips weak types: with other types the second
    # window would compile again.
    return jax.tree.map(lambda old, new: new.astype(old.dtype), info, new_info)


################################################################################
# The choice of a candidate
################################################################################


def batch_losses(loss_fn: LossFn, params: Params, batches: Batch) -> jax.Array:
    """Returns the losses ``[C]`` of `params` on ``batches [C, ...]``, in the default float type."""
    losses = jax.vmap(scalar(loss_fn), in_axes=(None, 0))(params, batches)
    return losses.astype(jnp.result_type(float))


def masked_mean(losses: Float[Array, "... C"], mask: Bool[Array, " C"]) -> jax.Array:
    """Returns the mean over the last axis of the `losses` that `mask` selects."""
    return jnp.sum(jnp.where(mask, losses, 0.0), axis=-1) / jnp.sum(mask)


def score(losses: Float[Array, "... C"], mask: Bool[Array, " C"], point: Params) -> jax.Array:
    """Returns the mean loss of a candidate, or +inf unless it is finite.

    Args:
      losses: validation losses ``[C]`` of the candidate.
      mask: ``[C]``, which of the losses count.
      point: params of the candidate. All of them must be finite, as must be the mean.
    """
    mean = masked_mean(losses, mask)
    return jnp.where(jnp.isfinite(mean) & all_finite(point), mean, jnp.inf)


def select(winner: Int[Array, ""], candidates: Sequence[Any], default: Any) -> Any:
    """Returns the candidate of index `winner`, or `default` if there is no such index.

    The choice is by `where` alone: NaN in another candidate leaves no trace, also in gradients.
    """
    selected = default
    for index, candidate in enumerate(candidates):
        selected = optax.tree.where(winner == index, candidate, selected)
    return selected


################################################################################
# Memory of the inner optimizers
################################################################################


def keep_counts(state: Any, new_state: Any) -> Any:
    """Returns `state` with the step counts of `new_state`.

    A step count is a field named ``count``, as in optax. Rolling an optimizer back must not roll
    its learning-rate schedule back. The count of a state with moments (a field ``mu``, as in
    optax's Adam) is left as it is: it is the number of gradients in the moments, which their bias
    correction needs.
    """
    has_moments = lambda node: {"count", "mu"} <= set(getattr(node, "_fields", ()))

    def choose(path, old, new):
        last: Any = path[-1] if path else None
        is_count = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "count"
        return new if is_count else old

    return jax.tree_util.tree_map_with_path(choose, state, new_state, is_leaf=has_moments)


def became_nonfinite(old: Any, new: Any) -> jax.Array:
    """Returns whether a value that is finite in `old` is not finite in `new` (bool ``[]``).

    A memory may start at inf, as that of optax's line searches does. The diagnostics and the
    intermediate values of a nested guard may hold NaN and are skipped.
    """
    is_skipped = lambda node: isinstance(node, GuardInfo | Work)
    leaves = [jax.tree.leaves(tree, is_leaf=is_skipped) for tree in (old, new)]
    pairs = [
        (before, after)
        for before, after in zip(*leaves, strict=True)
        if not is_skipped(after) and jnp.issubdtype(jnp.result_type(after), jnp.inexact)
    ]
    if not pairs:
        return jnp.array(False)

    def any_became_nonfinite(pairs):
        broken = [jnp.any(jnp.isfinite(before) & ~jnp.isfinite(after)) for before, after in pairs]
        return jnp.any(jnp.stack(broken))

    # The element-wise test costs memory (see `all_finite`), so it runs only when it is needed.
    healthy = all_finite([after for _, after in pairs])
    return jax.lax.cond(healthy, lambda pairs: jnp.array(False), any_became_nonfinite, pairs)


def keep_finite(new_state: Any, state: Any) -> Any:
    """Returns `new_state`, or `state` if a value that is finite there is not in `new_state`."""
    return optax.tree.where(became_nonfinite(state, new_state), state, new_state)


################################################################################
# Checks of arguments
################################################################################


def check_sizes(guard: str, n_t: int, n_c: int, *, least: int = 1) -> None:
    """Checks the numbers of mini-batches of a window.

    Raises:
      ValueError: when `n_t` is not an integer of at least `least`, or `n_c` of at least 1.
    """
    check_integer(f"{guard}: n_t", n_t, least)
    check_integer(f"{guard}: n_c", n_c, 1)


def check_window(
    guard: str, updates: Any, params: Params, loss_fn: Any, train_batches: Any, eval_batches: Any
) -> tuple[int, int]:
    """Checks the arguments of a guard's `update` in window form.

    Returns:
      The lengths of the leading axes of `train_batches` and of `eval_batches`.

    Raises:
      ValueError: when an argument is missing, `updates` is given, or the arrays of a window do
        not share a leading axis.
    """
    check_window_call(guard, updates, params)
    arguments = {"loss_fn": loss_fn, "train_batches": train_batches, "eval_batches": eval_batches}
    if missing := [name for name, value in arguments.items() if value is None]:
        raise ValueError(
            f"{guard}: update is missing {', '.join(missing)}; call update(None, state, params, "
            "loss_fn=..., train_batches=..., eval_batches=...)."
        )
    if not callable(loss_fn):
        raise ValueError(
            f"{guard}: loss_fn must be a function (params, batch) -> loss, got {show(loss_fn)}."
        )
    return (
        _leading_axis(guard, "train_batches", train_batches),
        _leading_axis(guard, "eval_batches", eval_batches),
    )


def _leading_axis(guard: str, name: str, batches: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{guard}: all arrays of {name} must share a leading axis over mini-batches, "
            f"got shapes {shapes}."
        )
    return shapes[0][0]


def check_lengths(guard: str, lengths: tuple[int, int], expected: tuple[int, int]) -> None:
    """Checks the numbers of training and validation mini-batches in a call.

    Raises:
      ValueError: when `lengths` differs from `expected`.
    """
    for kind, length, needed in zip(("train", "eval"), lengths, expected, strict=True):
        if length != needed:
            raise ValueError(
                f"{guard}: {kind}_batches holds {length} mini-batches, but this guard's windows "
                f"take {needed}."
            )
