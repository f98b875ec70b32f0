"""The loop over optimizee steps, and its lift from steps to windows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.core import cpu
from metaopt.core.checks import show
from metaopt.core.types import Batch, LossFn, Params, WindowForm, window_form


def step(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    value_fn: Callable[[Params], jax.Array],
    *,
    second_order: bool = True,
) -> tuple[Params, Any, tuple[jax.Array, Params]]:
    """One step of `tx` on one mini-batch.

    Args:
      tx: see `unroll`.
      params: params before the step.
      state: state of `tx` before the step.
      value_fn: ``params -> loss`` on the mini-batch.
      second_order: see `unroll`.

    Returns:
      params and state after the step, and the loss and its gradient before the step.
    """
    loss_fn = lambda params, _: (scalar(value_fn)(params), None)
    params, state, _, before = step_with_model_state(
        tx, params, state, None, loss_fn, second_order=second_order
    )
    return params, state, before


def step_with_model_state(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    model_state: Any,
    loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]],
    *,
    second_order: bool = True,
) -> tuple[Params, Any, Any, tuple[jax.Array, Params]]:
    """`step` of a loss with a model state, such as the running statistics of BatchNorm.

    Args:
      tx: see `unroll`.
      params: params before the step.
      state: state of `tx` before the step.
      model_state: model state before the step.
      loss_fn: ``(params, model_state) -> (loss, model_state)`` on the mini-batch.
      second_order: see `unroll`.

    Returns:
      params, state and model state after the step, and the loss and its gradient before it.
    """
    (value, new_model_state), grad = value_and_grad(loss_fn, params, model_state)
    seen = (value, grad) if second_order else jax.lax.stop_gradient((value, grad))
    updates, state = optax.with_extra_args_support(tx).update(
        seen[1],
        state,
        params,
        value=seen[0],
        grad=seen[1],
        value_fn=lambda params: loss_fn(params, model_state)[0],
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
    loss_fn: LossFn,
    batches: Batch,
    *,
    second_order: bool = True,
    remat: bool = False,
) -> tuple[Params, Any, jax.Array]:
    """Takes one step of `tx` per mini-batch.

    Args:
      tx: a per-step transformation. It receives optax's extra args `value`, `grad` and `value_fn`
        at the current params.
      params: initial params.
      state: initial state of `tx`.
      loss_fn: ``(params, batch) -> scalar``.
      batches: mini-batches with a leading axis ``[T, ...]``.
      second_order: False stops gradients at the loss value and the loss gradient that `tx`
        receives. This is the first-order rule of learned-optimizer training, which drops second
        derivatives of the loss. It has an effect only under differentiation.
      remat: under differentiation, store only params and state of each step, and recompute the
        rest. The result is the same; the unroll of an LSTM needs a fifth of the memory.

    Returns:
      params and state after T steps, and the losses ``[T]`` before each step.
    """
    body = _step(tx, loss_fn, second_order)
    if remat:  # in a scan nothing else could merge the two computations
        body = jax.checkpoint(body, prevent_cse=False)
    (params, state), losses = jax.lax.scan(body, (params, state), batches)
    return params, state, losses


def unroll_sampled(
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    loss_fn: LossFn,
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
      loss_fn: ``(params, batch) -> scalar``.
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


def _step(tx: optax.GradientTransformation, loss_fn: LossFn, second_order: bool):
    """The body of every loop: ``((params, state), batch) -> ((params, state), loss)``."""

    def body(carry, batch):
        params, state = carry
        value_fn = lambda p: loss_fn(p, batch)
        params, state, (value, _) = step(tx, params, state, value_fn, second_order=second_order)
        return (params, state), value

    return body


def mean_loss(loss_fn: LossFn, params: Params, batches: Batch) -> jax.Array:
    """Mean loss over ``batches [C, ...]``; +inf instead of NaN, so that it loses comparisons."""
    loss = jnp.mean(jax.vmap(scalar(loss_fn), in_axes=(None, 0))(params, batches))
    return jnp.where(jnp.isnan(loss), jnp.inf, loss)


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
      ``train_batches [T, ...]``, takes T steps and returns their sum.
    """

    def update_fn(updates, state, params=None, *, loss_fn, train_batches, **extra_args):
        del extra_args
        check_window_call("windowed", updates, params)
        new_params, state, _ = unroll(tx, params, state, loss_fn, train_batches)
        return optax.tree.sub(new_params, params), state

    return window_form(tx.init, update_fn)
