"""What all guards share: their description, diagnostics, the choice of a candidate, and checks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from metaopt.core.checks import check_integer
from metaopt.core.trees import add_to_count, all_finite, complex_leaf, leaf_names
from metaopt.core.types import LearnedOptimizer, Params, WindowForm, transformation

################################################################################
# The description of a guard
################################################################################


class Losses(NamedTuple):
    """The losses on one mini-batch.

    Attributes:
      train: ``(params, model_state) -> (loss, model_state)``, the loss to descend.
      judge: ``(params, model_state) -> losses [m]``, those that decide in validation phases; m is 1
        unless `eval_fn` returns several.
      held_out: whether `judge` is a loss of its own, that of `eval_fn`.
    """

    train: Callable[[Params, Any], tuple[jax.Array, Any]]
    judge: Callable[[Params, Any], jax.Array]
    held_out: bool

    def at(self, model_state: Any) -> Callable[[Params], jax.Array]:
        """Returns ``params -> loss`` at a fixed model state, as optax's `value_fn`."""
        return lambda params: self.train(params, model_state)[0]


class Process(NamedTuple):
    """The one description of a guard, from which both of its forms are made (`forms`).

    A window is a sequence of phases over single mini-batches, then a decision. `memory` is what
    decisions leave, with the diagnostics in its field `info`; `work` holds the runners and their
    losses. Where `init` returns None for `work`, `start` makes it anew for every window.

    Attributes:
      name: name of the guard in error messages.
      window: training and validation mini-batches of the first window.
      init: ``(params, model_state) -> (memory, work)``.
      start: ``(memory, work, params) -> work`` before the first mini-batch of a window.
      phases: one ``(memory, work, index, losses) -> work`` per phase, called once per mini-batch
        with the index of the mini-batch in the phase and its `Losses`.
      lengths: mini-batches in each phase of a window; where they change, a function
        ``memory -> int32 [phases]``, those of the next window.
      split: ``(num_train, num_eval) -> lengths`` of the phases, of a window of that many
        mini-batches. Raises `ValueError` where the guard takes other sizes.
      decide: ``(memory, work, params, lengths) -> (params, memory)`` after the last mini-batch.
      point: ``(memory, work) -> params`` of the caller after each mini-batch, also after the last
        one, where `decide` then leaves `params` as they are. None: they change with decisions only.
      model_state: ``(memory, work) -> model_state`` that belongs to the params of the caller.
    """

    name: str
    window: tuple[int, int]
    init: Callable[[Params, Any], tuple[Any, Any]]
    start: Callable[[Any, Any, Params], Any]
    phases: tuple[Callable[[Any, Any, Any, Losses], Any], ...]
    lengths: tuple[int, ...] | Callable[[Any], jax.Array]
    split: Callable[[int, int], tuple[int, ...]]
    decide: Callable[[Any, Any, Params, Any], tuple[Params, Any]]
    point: Callable[[Any, Any], Params] | None = None
    model_state: Callable[[Any, Any], Any] = lambda memory, work: None


class Work(NamedTuple):
    """The intermediate values of a window.

    They may be NaN or inf until the window is decided, so `became_nonfinite` skips this type.

    Attributes:
      value: `work` of a `Process`.
    """

    value: Any


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
        or a transformation in window form.
      TypeError: at `update`, when `tx` requires an extra arg that guards do not pass.
    """
    if isinstance(tx, LearnedOptimizer):
        raise ValueError(
            f"{guard}: {role} is a LearnedOptimizer, a whole family; "
            "give one transformation of it: learned.apply(theta)."
        )
    if isinstance(tx, WindowForm):
        raise ValueError(
            f"{guard}: {role} is in window form, which cannot take single steps; "
            "nest guards without guards.in_windows."
        )
    if isinstance(tx, optax.MultiSteps):  # its own conversion drops extra args
        tx = transformation(tx.init, tx.update)
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
      losses: float32 ``[k]``, mean losses of the k candidates at the last decision: +inf for a
        candidate that is not finite or did not run, and before the first decision.
      windows: int32 ``[]``, number of decisions so far.
      wins: int32 ``[k]``, number of decisions that each candidate won.
      kept_start: int32 ``[]``, number of decisions at which no proposal was finite and the
        starting point stayed.
      skipped: int32 ``[]``, steps of runners that led to params that are not finite, and were
        not taken (`race`).
      n_t: int32 ``[]``, training mini-batches of the next window.
      n_c: int32 ``[]``, validation mini-batches of the next window.
      gradient_evals: int32 ``[]``, gradients of the loss on one mini-batch that the guard has
        computed so far.
      loss_evals: int32 ``[]``, losses without gradient that the guard has computed so far: on one
        mini-batch, or calls of `eval_fn`.
    """

    accepted: Bool[Array, ""]
    winner: Int[Array, ""]
    losses: Float[Array, " k"]
    windows: Int[Array, ""]
    wins: Int[Array, " k"]
    kept_start: Int[Array, ""]
    skipped: Int[Array, ""]
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
        losses=jnp.full(num_candidates, jnp.inf, jnp.float32),
        windows=count(),
        wins=jnp.zeros(num_candidates, jnp.int32),
        kept_start=count(),
        skipped=count(),
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
    skipped: Any = 0,
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
      skipped: steps that were not taken since the last decision.
    """
    new_info = info._replace(
        accepted=accepted,
        winner=winner,
        losses=losses,
        windows=add_to_count(info.windows, 1),
        wins=add_to_count(info.wins, jnp.arange(info.wins.size) == winner),
        kept_start=add_to_count(info.kept_start, kept_start),
        skipped=add_to_count(info.skipped, skipped),
        gradient_evals=add_to_count(info.gradient_evals, gradient_evals),
        loss_evals=add_to_count(info.loss_evals, loss_evals),
    )
    # Cast to the dtypes of before, which also strips weak types: with other types the second
    # window would compile again.
    return jax.tree.map(lambda old, new: new.astype(old.dtype), info, new_info)


################################################################################
# The choice of a candidate
################################################################################


def masked_mean(losses: Float[Array, "... C"], mask: Bool[Array, " C"]) -> jax.Array:
    """Returns the mean over the last axis of the `losses` that `mask` selects."""
    return jnp.sum(jnp.where(mask, losses, 0.0), axis=-1) / jnp.sum(mask, dtype=losses.dtype)


def score(losses: Float[Array, "... C"], mask: Bool[Array, " C"], point: Params) -> jax.Array:
    """Returns the mean loss of a candidate, or +inf unless it is finite.

    Args:
      losses: validation losses ``[C]`` of the candidate.
      mask: ``[C]``, which of the losses count.
      point: params of the candidate. All of them must be finite, as must be the mean.
    """
    mean = masked_mean(losses, mask)
    return jnp.where(jnp.isfinite(mean) & all_finite(point), mean, jnp.inf)


def choose(index: Int[Array, ""], candidates: Sequence[Any]) -> Any:
    """Returns the candidate of an index, as `select`; a single one is returned as it is."""
    return select(index - 1, candidates[1:], candidates[0])


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
    return _map_counts(lambda old, new: new, lambda old, new: old, state, new_state)


def advance_counts(state: Any, number: Any) -> Any:
    """Returns `state` with `number` added to its step counts (see `keep_counts`)."""
    return _map_counts(lambda count: add_to_count(count, number), lambda leaf: leaf, state)


def _map_counts(on_count: Callable, on_other: Callable, state: Any, *others: Any) -> Any:
    has_moments = lambda node: {"count", "mu"} <= set(getattr(node, "_fields", ()))

    def choose(path, *leaves):
        last: Any = path[-1] if path else None
        is_count = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "count"
        return (on_count if is_count else on_other)(*leaves)

    return jax.tree_util.tree_map_with_path(choose, state, *others, is_leaf=has_moments)


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


def check_sizes(guard: str, n_t: int, n_c: int, *, least: tuple[int, int]) -> None:
    """Checks the numbers of mini-batches of a window.

    Raises:
      ValueError: when `n_t` or `n_c` is not an integer of at least that of `least`.
    """
    check_integer(f"{guard}: n_t", n_t, least[0])
    check_integer(f"{guard}: n_c", n_c, least[1])


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


def check_whole(guard: str, params: Params) -> None:
    """Checks that no param is masked or complex.

    JAX's gradient in complex params points along the conjugate of the direction of ascent. A loop
    must conjugate it, which a guard, that takes its gradients itself, cannot know.

    Raises:
      ValueError: when `params` holds an `optax.MaskedNode`, or a complex leaf, which is named.
    """
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        if jnp.iscomplexobj(leaf):
            raise ValueError(complex_leaf(guard, name, leaf.dtype))
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
        raise ValueError(
            f"{guard}: some params are masked, but a guard needs the loss of all params; "
            "put optax.masked and optax.partition around the transformations inside the guard."
        )
