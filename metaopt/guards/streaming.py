"""The second form of every guard: one mini-batch per call, as optax's line searches are called."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from metaopt.core.types import transformation
from metaopt.guards.core import Guard, Process, Work


class StreamingState(NamedTuple):
    """A guard in the middle of a window.

    Attributes:
      guard: the guard's own state as of the last decision, with its diagnostics.
      work: candidates and losses of the window so far.
      position: mini-batches of this window seen so far (int32).
    """

    guard: Any
    work: Work
    position: Int[Array, ""]


def streaming(guard: Guard) -> optax.GradientTransformationExtraArgs:
    """A per-mini-batch transformation that makes the same decisions as `guard` in window form.

    ``update(grads, state, params, *, value_fn)`` is called once per mini-batch, where
    ``value_fn(params)`` is the loss on it: the convention of `optax.lbfgs` and optax's line
    searches. `grads` may be None: a window steps from candidates that the caller never sees, so
    the guard takes its own gradients. Updates are zero up to the last mini-batch of a window,
    whose update leads to the point decided on: the params that the caller holds are accepted
    points at all times. The mini-batches are used in the order in which `windows` cuts them.

    The caller must apply the updates as they are (a decay or a clip behind the guard would move
    params off the accepted point), and must not change `params` inside of a window.

    Per-step guards (`gl2o`) already have this form; they come back unchanged.

    Notes:
      A call costs what its phase costs. That is a `lax.switch`: under `vmap` all its branches
      run. The state holds the candidates and their inner states besides those of the last
      decision. Sizes that grow (`Adaptive`) are traced here: nothing compiles twice.

    Raises:
      ValueError: `guard` is not a guard, or has no streaming form; `params` or `value_fn` is
        missing.
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
        del updates  # gradients at a point that no candidate is at
        lengths = process.lengths(state.guard)
        ends = jnp.cumsum(lengths)  # [phases]
        work = jax.lax.cond(
            state.position == 0,
            lambda: _like(state.work, Work(process.start(state.guard, params))),
            lambda: state.work,
        )
        phase = jnp.sum(state.position >= ends)
        index = state.position - (ends - lengths)[phase]
        steps = [
            lambda held, run=run: _like(held, run(held, index, value_fn)) for run in process.phases
        ]
        held = jax.lax.switch(phase, steps, work.held)

        def decided():
            new_params, new_guard = process.decide(state.guard, params, held, lengths)
            updates = optax.tree.sub(new_params, params)
            return _like((params, state.guard), (updates, new_guard))

        position = state.position + 1
        full = position == ends[-1]
        undecided = lambda: (optax.tree.zeros_like(params), state.guard)
        updates, new_guard = jax.lax.cond(full, decided, undecided)
        return updates, StreamingState(new_guard, Work(held), jnp.where(full, 0, position))

    return transformation(init_fn, update_fn)


def _like(example: Any, tree: Any) -> Any:
    """`tree` with the dtypes of `example`, weak types included: branches must agree on them."""
    return jax.tree.map(lambda e, t: jnp.asarray(t).astype(jnp.asarray(e).dtype), example, tree)
