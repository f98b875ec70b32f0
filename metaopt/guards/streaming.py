"""The streaming form of every guard: one mini-batch per call, as optax's line searches take it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from metaopt.core.types import transformation
from metaopt.guards.core import Guard, Process, Work


class StreamingState(NamedTuple):
    """State of a guard inside a window.

    Attributes:
      guard: state of the guard as of the last decision, with its diagnostics.
      work: candidates and losses of the window so far.
      position: int32 ``[]``, mini-batches of this window so far.
    """

    guard: Any
    work: Work
    position: Int[Array, ""]


def streaming(guard: Guard) -> optax.GradientTransformationExtraArgs:
    """Makes a per-mini-batch transformation that decides as `guard` does in window form.

    ``update(grads, state, params, *, value_fn)`` is called once per mini-batch, where
    ``value_fn(params)`` is the loss on it, as for `optax.lbfgs` and optax's line searches. `grads`
    may be None: the guard steps from candidates that the caller does not see and computes its own
    gradients. Updates are zero until the last mini-batch of a window, whose update leads to the
    chosen point. So the params of the caller are accepted points at all times. The order of
    mini-batches is that of `windows`.

    Warning:
      Apply the updates unchanged, since a decay or a clip behind the guard would move params off
      the accepted point. Do not change `params` inside a window.

    Args:
      guard: a guard of `metaopt.guards`. A per-step guard (`gl2o`) already has this form and is
        returned unchanged.

    Returns:
      A transformation; its `update` takes the extra arg `value_fn` and ignores others.

    Raises:
      ValueError: when `guard` is no guard or has no streaming form; at `update`, when `params` or
        `value_fn` is missing.

    Notes:
      A call costs what its phase costs. The phase is chosen by `lax.switch`, so under `vmap` all
      phases run. The state holds the candidates and their optimizer states besides those of the
      last decision. Sizes that grow (`Adaptive`) are traced: nothing compiles twice.
    """
    if not isinstance(guard, Guard):
        raise ValueError(
            "streaming: takes a guard of metaopt.guards; any other transformation is called once "
            f"per mini-batch already, got {guard!r}."
        )
    if isinstance(guard.process, str):
        raise ValueError(f"streaming: {guard.process}")
    if guard.process is None:
        return guard
    process: Process = guard.process

    def init_fn(params):
        state = guard.init(params)
        return StreamingState(
            guard=state,
            work=Work(process.start(state, params)),
            position=jnp.zeros([], jnp.int32),
        )

    def update_fn(updates, state: StreamingState, params=None, *, value_fn: Any = None, **extra):
        del extra
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(
                f"streaming: update is missing {missing}; call "
                "update(grads, state, params, value_fn=value_fn) with the loss on this mini-batch."
            )
        del updates  # gradients at `params`, from which no candidate steps inside a window
        lengths = process.lengths(state.guard)
        ends = jnp.cumsum(lengths)  # [phases]
        work = jax.lax.cond(
            state.position == 0,
            lambda: _cast_like(state.work, Work(process.start(state.guard, params))),
            lambda: state.work,
        )
        phase = jnp.sum(state.position >= ends)
        index = state.position - (ends - lengths)[phase]

        def branch(run_phase):
            return lambda work: _cast_like(work, run_phase(work, index, value_fn))

        work = jax.lax.switch(phase, [branch(run) for run in process.phases], work.value)

        def decide():
            new_params, new_guard = process.decide(state.guard, params, work, lengths)
            updates = optax.tree.sub(new_params, params)
            return _cast_like((params, state.guard), (updates, new_guard))

        def wait():
            return optax.tree.zeros_like(params), state.guard

        position = state.position + 1
        is_full = position == ends[-1]
        updates, new_guard = jax.lax.cond(is_full, decide, wait)
        return updates, StreamingState(new_guard, Work(work), jnp.where(is_full, 0, position))

    return transformation(init_fn, update_fn)


def _cast_like(example: Any, tree: Any) -> Any:
    """Casts `tree` to the dtypes of `example`, weak types included, as branches must agree."""
    return jax.tree.map(lambda e, t: jnp.asarray(t).astype(jnp.asarray(e).dtype), example, tree)
