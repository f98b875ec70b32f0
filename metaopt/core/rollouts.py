"""The loop over optimizee steps, and its lift from steps to windows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.core import cpu
from metaopt.core.checks import show
from metaopt.core.trees import cast_like, check_same_leaves, outermost
from metaopt.core.types import (
    Batch,
    HoldsModelState,
    Params,
    WindowForm,
    window_form,
    with_extra_args,
)


class WithModelState(NamedTuple):
    """State of a plain transformation, and beside it a model state.

    Attributes:
      state: state of the transformation.
      model_state: model state that belongs to the params of the caller.
    """

    state: Any
    model_state: Any


def init_state(tx: optax.GradientTransformation, params: Params, model_state: Any = None) -> Any:
    """The state of `tx` before its first step, for `unroll`.

    Args:
      tx: a transformation, or a guard.
      params: initial params.
      model_state: the model state that belongs to them, such as the running statistics of
        BatchNorm; None: there is none, and the result is ``tx.init(params)``.

    Returns:
      The state, which holds the model state. `model_state` reads it; a guard has one for each of
      its optimizers, of which that of your params is read.

    Examples:
      >>> loss_fn = lambda x, seen, batch: (jnp.sum((x - batch) ** 2), {"n": seen["n"] + 1})
      >>> tx, x = optax.sgd(0.1), jnp.zeros(3)
      >>> state = init_state(tx, x, {"n": 0})
      >>> x, state, losses = unroll(tx, x, state, loss_fn, jnp.ones((4, 3)))
      >>> int(model_state(state)["n"])
      4
    """
    if model_state is None:
        return tx.init(params)
    model_state = cast_like(model_state, model_state)
    if isinstance(tx, HoldsModelState):
        return tx.init(params, model_state)
    return WithModelState(tx.init(params), model_state)


def model_state(state: Any) -> Any:
    """Returns the model state that belongs to the caller's params.

    Args:
      state: a state of `init_state` or of a guard that was initialised with a model state, or any
        optimizer state that contains one.

    Returns:
      The model state, such as the running statistics of BatchNorm.

    Raises:
      ValueError: when `state` contains no model state.
    """
    holder = outermost(state, lambda node: hasattr(node, "model_state"))
    if holder is None or holder.model_state is None:
        raise ValueError(
            "model_state: the state has no model state; initialise a guard with "
            "guard.init(params, model_state), another transformation with "
            "metaopt.init_state(tx, params, model_state)."
        )
    return holder.model_state


def held_model_state(state: Any) -> Any:
    """The model state that an optimizer's state itself holds, or None."""
    return getattr(state, "model_state", None)


def step(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    value_fn: Callable[..., Any],
    *,
    eval_fn: Callable[..., jax.Array] | None = None,
    second_order: bool = True,
) -> tuple[Params, Any, tuple[jax.Array, Params]]:
    """One step of `tx` on one mini-batch.

    Args:
      tx: see `unroll`.
      params: params before the step.
      state: state of `tx` before the step.
      value_fn: ``params -> loss`` on the mini-batch; where the state holds a model state,
        ``(params, model_state) -> (loss, model_state)``.
      eval_fn: see `unroll`.
      second_order: see `unroll`.

    Returns:
      params and state after the step, and the loss and its gradient before the step.
    """
    held = held_model_state(state)
    given = {} if eval_fn is None else {"eval_fn": eval_fn}
    loss_fn = checked_loss("unroll", value_fn, held)
    if held is None or isinstance(state, WithModelState):
        inner = state if held is None else state.state
        params, inner, held, before = step_with_model_state(
            tx, params, inner, held, loss_fn, second_order=second_order, **given
        )
        return params, inner if held is None else WithModelState(inner, held), before
    # A guard: each of its optimizers has a model state of its own.
    (value, _), grad = value_and_grad(loss_fn, params, held)
    updates, state = with_extra_args(tx).update(
        grad, state, params, value=value, grad=grad, value_fn=loss_fn, **given
    )
    return optax.apply_updates(params, updates), state, (value, grad)


def step_with_model_state(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    model_state: Any,
    loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]],
    *,
    second_order: bool = True,
    **extra_args: Any,
) -> tuple[Params, Any, Any, tuple[jax.Array, Params]]:
    """`step` of a loss with a model state, such as the running statistics of BatchNorm.

    Args:
      tx: see `unroll`.
      params: params before the step.
      state: state of `tx` before the step.
      model_state: model state before the step.
      loss_fn: ``(params, model_state) -> (loss, model_state)`` on the mini-batch.
      second_order: see `unroll`.
      **extra_args: further ones for `tx`.

    Returns:
      params, state and model state after the step, and the loss and its gradient before it.
    """
    (value, new_model_state), grad = value_and_grad(loss_fn, params, model_state)
    seen = (value, grad) if second_order else jax.lax.stop_gradient((value, grad))
    updates, state = with_extra_args(tx).update(
        seen[1],
        state,
        params,
        value=seen[0],
        grad=seen[1],
        value_fn=lambda params: loss_fn(params, model_state)[0],
        **extra_args,
    )
    return optax.apply_updates(params, updates), state, new_model_state, (value, grad)


def value_and_grad(
    loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]], params: Params, model_state: Any
) -> tuple[tuple[jax.Array, Any], Params]:
    """``((loss, model_state), gradient)``, in the form that CPUs compute fast in loops too."""
    outputs, grad = cpu.fast_convolutions(jax.value_and_grad(loss_fn, has_aux=True))(
        params, model_state
    )
    return outputs, jax.tree.map(cpu.in_rows, grad)


def unroll(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    loss_fn: Callable[..., Any],
    batches: Batch,
    *,
    eval_fn: Callable[..., jax.Array] | None = None,
    second_order: bool = True,
    remat: bool = False,
) -> tuple[Params, Any, jax.Array]:
    """Takes one step of `tx` per mini-batch.

    Args:
      tx: a per-step transformation. It receives optax's extra args `value`, `grad` and `value_fn`
        at the current params.
      params: initial params.
      state: initial state of `tx`: ``tx.init(params)``, or `init_state` with a model state.
      loss_fn: ``(params, batch) -> scalar``; where the state holds a model state,
        ``(params, model_state, batch) -> (scalar, model_state)``.
      batches: mini-batches with a leading axis ``[T, ...]``.
      eval_fn: the held-out loss that a guard may decide by, as in `metaopt.guards.Guard`:
        ``params -> loss``, or ``(params, model_state) -> loss``. Plain transformations ignore it.
      second_order: False stops gradients at the loss value and the loss gradient that `tx`
        receives. This is the first-order rule of learned-optimizer training, which drops second
        derivatives of the loss. It has an effect only under differentiation.
      remat: under differentiation, store only params and state of each step, and recompute the
        rest. The result is the same; the unroll of an LSTM needs a fifth of the memory.

    Returns:
      params and state after T steps, and the losses ``[T]`` before each step. The model state after
      the steps is ``model_state(state)``.
    """
    body = _step(tx, loss_fn, second_order, eval_fn)
    if remat:  # in a scan nothing else could merge the two computations
        body = jax.checkpoint(body, prevent_cse=False)
    (params, state), losses = jax.lax.scan(body, (params, state), batches)
    return params, state, losses


def unroll_sampled(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    loss_fn: Callable[..., Any],
    sample: Callable[[jax.Array], Batch],
    num_steps: jax.Array | int,
) -> tuple[Params, Any, jax.Array]:
    """`unroll` without stored mini-batches, for a number of steps that may be traced.

    Mini-batch t is ``sample(t)``, drawn when it is needed. The loop has no reverse-mode derivative,
    since its length is not static.

    Args:
      tx: see `unroll`.
      params: initial params.
      state: initial state of `tx`.
      loss_fn: see `unroll`.
      sample: ``t -> batch``.
      num_steps: number of steps.

    Returns:
      params, state, and the mean (a scalar) of the losses before each step; 0 without steps.
    """
    one_step = _step(tx, loss_fn, second_order=True)

    def body(t, carry):
        inner, total = carry
        inner, value = one_step(inner, sample(t))
        return inner, total + value

    start = ((params, state), jnp.zeros([]))
    (params, state), total = jax.lax.fori_loop(0, num_steps, body, start)
    return params, state, total / jnp.maximum(num_steps, 1)


def _step(
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Any],
    second_order: bool,
    eval_fn: Callable[..., jax.Array] | None = None,
):
    """The body of every loop: ``((params, state), batch) -> ((params, state), loss)``."""

    def body(carry, batch):
        params, state = carry
        value_fn = lambda *point: loss_fn(*point, batch)
        params, state, (value, _) = step(
            tx, params, state, value_fn, eval_fn=eval_fn, second_order=second_order
        )
        return (params, state), value

    return body


def train_loss(
    loss_fn: Callable[..., Any], params: Params, model_state: Any, batch: Batch
) -> jax.Array:
    """The loss before a step on `batch`, of a `loss_fn` as in `unroll`."""
    value_fn = lambda *point: loss_fn(*point, batch)
    return checked_loss("unroll", value_fn, model_state)(params, model_state)[0]


def mean_loss(loss_fn: Callable[[Any, Batch], jax.Array], params: Any, batches: Batch) -> jax.Array:
    """Mean loss over ``batches [C, ...]``; +inf instead of NaN, so that it loses comparisons."""
    loss = jnp.mean(jax.vmap(scalar(loss_fn), in_axes=(None, 0))(params, batches))
    return jnp.where(jnp.isnan(loss), jnp.inf, loss)


def checked_loss(
    name: str, value_fn: Callable[..., Any], model_state: Any
) -> Callable[[Params, Any], tuple[jax.Array, Any]]:
    """A loss on one mini-batch in one form, with or without a model state.

    Args:
      name: what called it, for messages.
      value_fn: ``params -> loss`` if `model_state` is None, else
        ``(params, model_state) -> (loss, model_state)``.
      model_state: the first model state, or None.

    Returns:
      ``(params, model_state) -> (loss, model_state)``, which raises `ValueError` when `value_fn`
      returns no scalar, or a model state with other leaves than it was given.
    """
    if model_state is None:
        return lambda params, _: (scalar(value_fn)(params), None)

    def with_state(params, model_state):
        output = value_fn(params, model_state)
        if not (isinstance(output, tuple) and len(output) == 2):
            raise ValueError(
                f"{name}: with a model state, the loss must return (loss, new_model_state), "
                f"got {show(output)}."
            )
        loss, new_state = output
        check_same_leaves(f"{name}: the model state that the loss returned", model_state, new_state)
        return scalar(lambda: loss)(), cast_like(model_state, new_state)

    return with_state


def scalar(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`loss_fn`, which raises `ValueError` unless it returns one real number."""

    def checked(*arguments):
        loss = loss_fn(*arguments)
        is_array = isinstance(loss, jax.Array | np.ndarray | np.generic | float)
        if (
            not is_array
            or jnp.shape(loss)
            or not jnp.issubdtype(jnp.result_type(loss), jnp.floating)
        ):
            given = show(loss) if hasattr(loss, "dtype") else f"a {type(loss).__name__}"
            raise ValueError(
                f"loss_fn must return one real number, got {given}; return the mean over the "
                "mini-batch, without auxiliary outputs."
            )
        return loss

    return checked


def check_window_call(name: str, updates: Any, params: Params) -> None:
    """Raises `ValueError` if a window update was called like a per-step update."""
    if params is None:
        raise ValueError(
            f"{name}: update needs `params`; a window starts from a parameter vector. "
            "Call update(None, state, params, ...)."
        )
    if updates is not None:
        raise ValueError(
            f"{name}: pass updates=None. A window computes its own gradients from "
            "`train_batches`, so incoming updates (e.g. chain(clip(1.0), guard)) would be lost; "
            "put clip into the inner optimizer."
        )


def windowed(tx: optax.GradientTransformation) -> WindowForm:
    """Lifts a per-step transformation to the window form of the guards.

    One loop can then run plain and guarded optimizers.

    Args:
      tx: a per-step transformation.

    Returns:
      A transformation whose ``update(None, state, params, *, loss_fn, train_batches)``, with
      ``train_batches [T, ...]``, takes T steps and returns their sum. After
      ``init(params, model_state)`` the loss is that of `unroll` with a model state, and
      ``metaopt.model_state(state)`` returns the new one. With `eval_fn`, which takes the
      arguments of that of `guards.in_windows`, its losses ``[C]`` on ``eval_batches [C, ...]`` are
      the `eval_fn` of `unroll`. Without it, `eval_batches` are ignored.
    """

    def init_fn(params, model_state=None):
        return init_state(tx, params, model_state)

    def update_fn(
        updates,
        state,
        params=None,
        *,
        loss_fn,
        train_batches,
        eval_batches=None,
        eval_fn=None,
        **extra_args,
    ):
        del extra_args
        check_window_call("windowed", updates, params)

        judge_fn = None
        if eval_fn is not None:
            judge_fn = lambda *point: jax.vmap(lambda batch: eval_fn(*point, batch))(eval_batches)
        new_params, state, _ = unroll(tx, params, state, loss_fn, train_batches, eval_fn=judge_fn)
        return optax.tree.sub(new_params, params), state

    return window_form(init_fn, update_fn)
