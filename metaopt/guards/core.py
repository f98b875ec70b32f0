"""What all guards share: their form, diagnostics, checks, and the choice between candidates."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from metaopt.core.checks import check_integer, short
from metaopt.core.rollouts import check_window_call, scalar
from metaopt.core.trees import all_finite
from metaopt.core.types import Batch, LearnedOptimizer, LossFn, Params, transformation


class GuardInfo(NamedTuple):
    """Diagnostics of a guard, part of its state; read them with `optax.tree_utils.tree_get`.

    Attributes:
      accepted: whether the last decision took what the learned optimizer proposed (bool).
      winner: index of the candidate that the last decision took; -1 where the starting point
        stayed because no proposal was finite, and before the first decision (int32).
      losses: mean validation losses ``[k]`` of the candidates at the last decision (float32);
        +inf for a candidate that is not finite, NaN before the first decision.
      windows: decisions so far (int32).
      wins: decisions ``[k]`` that each candidate won.
      kept_start: decisions at which no proposal was finite, so that the starting point stayed.
      n_t, n_c: training and validation mini-batches of the next window (int32).
      gradient_evals, loss_evals: evaluations of the loss with and without gradient, on one
        mini-batch each, that the guard has asked for so far (int32).
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


class Process(NamedTuple):
    """A guard told mini-batch by mini-batch, from which `streaming` makes its second form.

    A window is a sequence of phases. `work` is what has to be remembered inside of a window.

    Attributes:
      start: ``(state, params) -> work`` at the beginning of a window.
      phases: per phase ``(work, index, value_fn) -> work``, called once per mini-batch with its
        index in the phase.
      lengths: ``state -> int32 [phases]``, mini-batches in each phase of the next window.
      decide: ``(state, params, work, lengths) -> (params, state)`` at the end of a window.
    """

    start: Callable[[Any, Params], Any]
    phases: tuple[Callable[[Any, jax.Array, Callable], Any], ...]
    lengths: Callable[[Any], jax.Array]
    decide: Callable[[Any, Params, Any, Any], tuple[Params, Any]]


class Work(NamedTuple):
    """What a stream remembers inside of a window; may hold NaN. Attributes: held."""

    held: Any


class Guard(optax.GradientTransformationExtraArgs):
    """An optax transformation in window form that also knows how it runs as a stream.

    Attributes:
      window: training and validation mini-batches of the first window.
      process: the guard mini-batch by mini-batch; a message why it has no such form; or None for
        a guard that is a per-step transformation itself.
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


def new_info(num_candidates: int, n_t: int, n_c: int) -> GuardInfo:
    """Diagnostics before the first window."""
    count = lambda start=0: jnp.array(start, jnp.int32)  # buffers of their own: may be donated
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


def record(
    info: GuardInfo,
    winner: Int[Array, ""],
    accepted: Bool[Array, ""],
    scores: Float[Array, " k"],
    kept_start: Bool[Array, ""],
    *,
    gradients: Any,
    losses: Any,
) -> GuardInfo:
    """`info` after one more decision, which cost that many `gradients` and `losses`."""
    newer = info._replace(
        accepted=accepted,
        winner=winner,
        losses=scores,
        windows=info.windows + 1,
        wins=info.wins + (jnp.arange(info.wins.size) == winner),
        kept_start=info.kept_start + kept_start,
        gradient_evals=info.gradient_evals + gradients,
        loss_evals=info.loss_evals + losses,
    )
    # The very types of before, weak types included: else the second window compiles again.
    return jax.tree.map(lambda old, new: new.astype(old.dtype), info, newer)


def score(losses: Float[Array, "... C"], mask: Bool[Array, " C"], point: Params) -> jax.Array:
    """Mean of the `losses` in `mask` at `point`; +inf unless it and all of `point` are finite."""
    mean = masked_mean(losses, mask)
    return jnp.where(jnp.isfinite(mean) & all_finite(point), mean, jnp.inf)


def masked_mean(losses: Float[Array, "... C"], mask: Bool[Array, " C"]) -> jax.Array:
    """Mean over the last axis of the `losses` in `mask`."""
    return jnp.sum(jnp.where(mask, losses, 0.0), axis=-1) / jnp.sum(mask)


def select(winner: Int[Array, ""], candidates: Sequence[Any], otherwise: Any) -> Any:
    """The candidate of index `winner`, by `where` alone; `otherwise` where there is none."""
    for index, candidate in enumerate(candidates):
        otherwise = optax.tree.where(winner == index, candidate, otherwise)
    return otherwise


def batch_losses(loss_fn: LossFn, params: Params, batches: Batch) -> jax.Array:
    """Losses of `params` on each of ``batches [C, ...]``, as ``[C]`` of the default float type."""
    losses = jax.vmap(scalar(loss_fn), in_axes=(None, 0))(params, batches)
    return losses.astype(jnp.result_type(float))


def keep_counts(state: Any, newer: Any) -> Any:
    """`state`, but with the step counts (every field named ``count``) of `newer`.

    Rolling an optimizer back must not take its learning-rate schedule back. A count beside moments
    (a field ``mu``, as in optax's Adam) is no time of the run: it says how many gradients are in
    them, for the bias correction, and stays with them.
    """
    moments = lambda node: {"count", "mu"} <= set(getattr(node, "_fields", ()))

    def choose(path, old, new):
        last: Any = path[-1] if path else None
        is_count = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "count"
        return new if is_count else old

    return jax.tree_util.tree_map_with_path(choose, state, newer, is_leaf=moments)


def became_nonfinite(old: Any, new: Any) -> jax.Array:
    """Whether something that is finite in `old` is not finite in `new`.

    A memory that starts at inf, like that of optax's line searches, is legal, and so are the
    diagnostics and the undecided candidates of a nested guard.
    """
    opaque = lambda node: isinstance(node, GuardInfo | Work)
    leaves = [jax.tree.leaves(tree, is_leaf=opaque) for tree in (old, new)]
    pairs = [
        (before, after)
        for before, after in zip(*leaves, strict=True)
        if not opaque(after) and jnp.issubdtype(jnp.result_type(after), jnp.inexact)
    ]
    if not pairs:
        return jnp.array(False)

    def compared(pairs):
        broken = [jnp.any(jnp.isfinite(before) & ~jnp.isfinite(after)) for before, after in pairs]
        return jnp.any(jnp.stack(broken))

    # Element by element only where it must be: see `all_finite`.
    healthy = all_finite([after for _, after in pairs])
    return jax.lax.cond(healthy, lambda pairs: jnp.array(False), compared, pairs)


def without_new_nan(state: Any, otherwise: Any) -> Any:
    """`state`, or `otherwise` if something that is finite there is not finite in `state`."""
    return optax.tree.where(became_nonfinite(otherwise, state), otherwise, state)


def inner(name: str, role: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    """`tx` as part of the guard `name`, with errors that say which part it is.

    Raises:
      ValueError: `tx` cannot be stepped (it is a `LearnedOptimizer`, or a guard in window form).
    """
    if isinstance(tx, LearnedOptimizer):
        raise ValueError(
            f"{name}: {role} is a LearnedOptimizer, a whole family; "
            "give one transformation of it: learned.apply(theta)."
        )
    if isinstance(tx, Guard) and tx.process is not None:
        raise ValueError(
            f"{name}: {role} is a guard in window form, which cannot take single steps; "
            "nest guards as guards.streaming(guard)."
        )
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(f"{name}: {role} must be an optax transformation, got {tx!r}.")
    wrapped = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        try:
            return wrapped.update(updates, state, params, **extra_args)
        except TypeError as error:
            if "keyword" not in str(error):
                raise
            raise TypeError(
                f"{name}: the {role} transformation takes other extra args than a guard gives, "
                f"which are {', '.join(extra_args)}: {error}"
            ) from error

    return transformation(wrapped.init, update_fn)


def check_sizes(name: str, n_t: int, n_c: int, *, least: int = 1) -> None:
    """Raises `ValueError` unless a window of n_t and n_c mini-batches is possible."""
    for key, value, lowest in (("n_t", n_t, least), ("n_c", n_c, 1)):
        check_integer(f"{name}: {key}", value, lowest)


def check_window(
    name: str, updates: Any, params: Params, loss_fn: Any, train_batches: Any, eval_batches: Any
) -> tuple[int, int]:
    """The lengths of both leading axes, or `ValueError` for a call that is not a window's."""
    check_window_call(name, updates, params)
    given = {"loss_fn": loss_fn, "train_batches": train_batches, "eval_batches": eval_batches}
    if missing := [key for key, value in given.items() if value is None]:
        raise ValueError(
            f"{name}: update is missing {', '.join(missing)}; call update(None, state, params, "
            "loss_fn=..., train_batches=..., eval_batches=...)."
        )
    if not callable(loss_fn):
        raise ValueError(
            f"{name}: loss_fn must be a function (params, batch) -> loss, got {short(loss_fn)}."
        )
    return _leading_axis(name, "train_batches", train_batches), _leading_axis(
        name, "eval_batches", eval_batches
    )


def _leading_axis(name: str, what: str, batches: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{name}: all arrays of {what} must share a leading axis over mini-batches, "
            f"got shapes {shapes}."
        )
    return shapes[0][0]


def check_lengths(name: str, given: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raises `ValueError` unless a window has the expected numbers of mini-batches."""
    for what, length, wanted in zip(("train", "eval"), given, expected, strict=True):
        if length != wanted:
            raise ValueError(
                f"{name}: {what}_batches holds {length} mini-batches, but this guard's windows "
                f"take {wanted}."
            )
