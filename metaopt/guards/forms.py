"""The two forms of every guard: one mini-batch per call, or one window of mini-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from metaopt.core.checks import show
from metaopt.core.rollouts import check_window_call, checked_loss, scalar, windowed
from metaopt.core.trees import cast_like, outermost, with_nodes_of
from metaopt.core.types import (
    Batch,
    HoldsModelState,
    Params,
    WindowForm,
    loss_arguments,
    window_form,
)
from metaopt.guards.core import GuardInfo, Losses, Process, Work, check_whole


class GuardState(NamedTuple):
    """State of a guard.

    Attributes:
      memory: what the last decision left; its field `info` holds the diagnostics (`GuardInfo`).
      work: the runners and their losses. In window form None, unless runners outlive a window.
      position: int32 ``[]``, mini-batches of this window so far.
      model_state: model state that belongs to the params of the caller, or None.
    """

    memory: Any
    work: Work | None
    position: Int[Array, ""]
    model_state: Any

    @property
    def info(self) -> GuardInfo:
        """The diagnostics as of the last decision."""
        return self.memory.info


def info(state: Any) -> GuardInfo:
    """Returns the diagnostics of a guard: of the outermost one, where guards are nested.

    Args:
      state: state of a guard, or any optimizer state that contains one.

    Raises:
      ValueError: when `state` contains no guard.
    """
    guard = outermost(state, lambda node: isinstance(getattr(node, "info", None), GuardInfo))
    if guard is None:
        raise ValueError(f"info: the state contains no guard, got {type(state).__name__}.")
    return guard.info


class Guard(HoldsModelState):
    """An optax transformation that decides between optimizers.

    Attributes:
      init: ``(params, model_state=None) -> state``.
      update: ``(grads or None, state, params, *, value_fn, eval_fn=None) -> (updates, state)``,
        called once per mini-batch. ``value_fn(params)`` is the loss on it, as for `optax.lbfgs`
        and optax's line searches; with a model state ``value_fn(params, model_state)`` returns
        ``(loss, new_model_state)``. In validation phases, `eval_fn` (with the arguments of
        `value_fn`) returns the loss that decides, or several, ``[m]``, of which the mean decides,
        and nothing else; None: that of `value_fn`. `race` takes an `eval_fn` without validation
        phases (``n_c=0``) too.
        A guard computes its own gradients at its own points and ignores `grads`, which XLA then
        does not compute.
    """

    update: Callable[..., tuple[Any, Any]]  # type: ignore  # optax's wants gradients, not None

    @property
    def process(self) -> Process | None:
        """The description of the guard, or None where each step decides on its own."""
        return getattr(getattr(self.update, "__self__", None), "process", None)

    @property
    def period(self) -> int | None:
        """Mini-batches of every window. None where sizes change, or each step decides (`gl2o`)."""
        if self.process is None:
            return None
        lengths = self.process.lengths
        return None if callable(lengths) else sum(lengths)

    @property
    def window(self) -> tuple[int, int]:
        """Training and validation mini-batches of the first window, for `metaopt.windows`."""
        return (1, 0) if self.process is None else self.process.window


def guard_of(process: Process) -> Guard:
    """Makes the guard that a `Process` describes."""
    stream = _Stream(process)
    make: Any = Guard
    return make(stream.init, stream.update)


@dataclass(frozen=True)
class _Stream:
    """One mini-batch per call, at a dynamic position in the window."""

    process: Process

    def init(self, params: Params, model_state: Any = None) -> GuardState:
        memory, work = _init(self.process, params, model_state)
        if work is None:
            work = self.process.start(memory, None, params)
            # Each leaf is a buffer of its own, so that params and state can be donated.
            work = jax.tree.map(jnp.array, work)
        return _state(self.process, memory, work, 0)

    def update(
        self,
        updates: Any,
        state: GuardState,
        params: Params = None,
        *,
        value_fn: Any = None,
        eval_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, GuardState]:
        del updates, extra_args  # gradients at the caller's params; see `Guard`
        process = self.process
        if params is None or value_fn is None:
            missing = "params" if params is None else "value_fn"
            raise ValueError(
                f"{process.name}: update is missing {missing}; call "
                "update(grads, state, params, value_fn=value_fn) with the loss on this mini-batch."
            )
        state = with_nodes_of(lambda: self.init(params, state.model_state), state)
        memory = state.memory
        assert state.work is not None
        losses = losses_of(process.name, value_fn, eval_fn, state.model_state)
        started = process.start(memory, state.work.value, params)
        is_first = state.position == 0
        work = jax.tree.map(
            lambda new, old: old if new is old else jnp.where(is_first, new, old),
            cast_like(state.work.value, started),
            state.work.value,
        )

        lengths = process.lengths(memory) if callable(process.lengths) else process.lengths
        if len(process.phases) == 1:
            work = cast_like(work, process.phases[0](memory, work, state.position, losses))
        else:
            work = _run_phase(process, memory, work, state.position, losses, lengths)

        position = state.position + 1
        is_full = position == sum(lengths)
        if process.point is None:
            new_params, memory = jax.lax.cond(
                is_full,
                lambda: cast_like((params, memory), process.decide(memory, work, params, lengths)),
                lambda: (params, memory),
            )
        else:
            memory = jax.lax.cond(
                is_full,
                lambda: cast_like(memory, process.decide(memory, work, params, lengths)[1]),
                lambda: memory,
            )
            new_params = process.point(memory, work)
        new_state = _state(process, memory, work, jnp.where(is_full, 0, position))
        return _difference(new_params, params), new_state


def in_windows(guard: Guard) -> WindowForm:
    """Makes the window form of a guard, which takes all mini-batches of a window in one call.

    Decisions and points are those of the guard itself on the same mini-batches, in the order of
    `windows`. Loops over mini-batches have static lengths: under `vmap` no phase runs that is not
    due. Suites and experiments use this form; a training loop needs only the guard itself.

    Args:
      guard: a guard of `metaopt.guards`. `gl2o`, which decides at each step, takes windows of any
        number of training mini-batches.

    Returns:
      A transformation with ``update(None, state, params, *, loss_fn, train_batches,
      eval_batches=None, eval_fn=None)`` and batches with leading axes ``[n_t, ...]`` and
      ``[n_c, ...]``; ``guard.window`` holds both sizes. With a model state
      ``loss_fn(params, model_state, batch)`` returns ``(loss, new_model_state)``; `eval_fn` has
      the same arguments and returns a loss.

    Raises:
      ValueError: when `guard` is no guard; at `update`, when `params`, `loss_fn` or batches are
        missing, `updates` are given, or a window has another size.
    """
    if not isinstance(guard, Guard):
        raise ValueError(
            f"in_windows: takes a guard of metaopt.guards, got {guard!r}; "
            "for any other transformation use metaopt.windowed."
        )
    process = guard.process
    if process is None:
        return windowed(guard)
    return _windows_of(process)


def _windows_of(process: Process) -> WindowForm:
    def init_fn(params: Params, model_state: Any = None) -> GuardState:
        memory, work = _init(process, params, model_state)
        return _state(process, memory, work, 0)

    def update_fn(
        updates: Any,
        state: GuardState,
        params: Params = None,
        *,
        loss_fn: Any = None,
        train_batches: Batch = None,
        eval_batches: Batch = None,
        eval_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, GuardState]:
        del extra_args
        numbers = _check_call(process, updates, params, loss_fn, train_batches, eval_batches)
        lengths = process.split(*numbers)
        memory, carried = state.memory, state.work
        work = process.start(memory, None if carried is None else carried.value, params)

        def losses_on(batch: Batch) -> Losses:
            value_fn = lambda *params_and_state: loss_fn(*params_and_state, batch)
            judge_fn = lambda *params_and_state: eval_fn(*params_and_state, batch)
            return losses_of(
                process.name, value_fn, judge_fn if eval_fn else None, state.model_state
            )

        for run_phase, length, (batches, first) in zip(
            process.phases, lengths, _cut(train_batches, eval_batches, lengths), strict=True
        ):

            def body(work, index, run_phase=run_phase, batches=batches, first=first):
                # Not a scan over the mini-batches of the phase, which would copy them.
                pick = lambda leaf: jax.lax.dynamic_index_in_dim(
                    jnp.asarray(leaf), first + index, keepdims=False
                )
                batch = jax.tree.map(pick, batches)
                new_work = run_phase(memory, work, index, losses_on(batch))
                return cast_like(work, new_work), None

            if length == 1:  # XLA for CPUs is slower in loops
                work, _ = body(work, 0)
            elif length > 1:
                work, _ = jax.lax.scan(body, work, jnp.arange(length))
        new_params, memory = cast_like(
            (params, memory), process.decide(memory, work, params, lengths)
        )
        if process.point is not None:
            new_params = process.point(memory, work)
        new_state = _state(process, memory, work, 0)
        if carried is None:
            new_state = new_state._replace(work=None)
        return _difference(new_params, params), new_state

    return window_form(init_fn, update_fn)


def _init(process: Process, params: Params, model_state: Any) -> tuple[Any, Any]:
    check_whole(process.name, params)
    return process.init(params, model_state)


def _state(process: Process, memory: Any, work: Any, position: Any) -> GuardState:
    return GuardState(
        memory=memory,
        work=None if work is None else Work(work),
        position=jnp.asarray(position, jnp.int32),
        model_state=process.model_state(memory, work),
    )


def _run_phase(
    process: Process, memory: Any, work: Any, position: Any, losses: Losses, lengths: Any
) -> Any:
    """Runs the phase to which `position` belongs."""
    lengths = jnp.stack([jnp.asarray(length, jnp.int32) for length in lengths])
    ends = jnp.cumsum(lengths)
    phase = jnp.sum(position >= ends)
    index = position - (ends - lengths)[phase]

    def branch(run_phase):
        return lambda work: cast_like(work, run_phase(memory, work, index, losses))

    return jax.lax.switch(phase, [branch(run) for run in process.phases], work)


def losses_of(name: str, value_fn: Callable, eval_fn: Callable | None, model_state: Any) -> Losses:
    """The losses of one mini-batch, with a model state in any case."""
    train = checked_loss(name, value_fn, model_state)

    def judge(params, model_state):
        if eval_fn is None:
            return train(params, model_state)[0][None]
        losses = eval_fn(*loss_arguments(params, model_state))
        if jnp.ndim(losses) == 1 and jnp.size(losses):
            return jax.vmap(scalar(lambda loss: loss))(jnp.asarray(losses))
        return scalar(lambda: losses)()[None]

    return Losses(train, judge, held_out=eval_fn is not None)


def _check_call(
    process: Process,
    updates: Any,
    params: Params,
    loss_fn: Any,
    train_batches: Any,
    eval_batches: Any,
) -> tuple[int, int]:
    """Checks the arguments of `update` in window form; returns the numbers of mini-batches."""
    name = process.name
    check_window_call(name, updates, params)
    arguments = {"loss_fn": loss_fn, "train_batches": train_batches}
    if process.window[1]:
        arguments["eval_batches"] = eval_batches
    if missing := [argument for argument, value in arguments.items() if value is None]:
        raise ValueError(
            f"{name}: update is missing {', '.join(missing)}; call update(None, state, params, "
            "loss_fn=..., train_batches=..., eval_batches=...)."
        )
    if not callable(loss_fn):
        raise ValueError(
            f"{name}: loss_fn must be a function (params, batch) -> loss, got {show(loss_fn)}."
        )
    return (
        _leading_axis(name, "train_batches", train_batches),
        0 if eval_batches is None else _leading_axis(name, "eval_batches", eval_batches),
    )


def _leading_axis(guard: str, name: str, batches: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"{guard}: all arrays of {name} must share a leading axis over mini-batches, "
            f"got shapes {shapes}."
        )
    return shapes[0][0]


def _cut(
    train_batches: Batch, eval_batches: Batch, lengths: tuple[int, ...]
) -> list[tuple[Batch, int]]:
    """For each phase the mini-batches of which it takes some, and the index of its first one.

    Phases take those to train on in order, then those to judge by.
    """
    num_train = jax.tree.leaves(train_batches)[0].shape[0]
    pieces = []
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        source, last = train_batches, end
        if end > num_train:
            source, last = eval_batches, end - num_train
        pieces.append((source, last - length))
    return pieces


def _difference(new_params: Params, params: Params) -> Any:
    """Updates that lead from `params` to `new_params`, with the rounding of the sum corrected."""

    def of_leaf(new, old):
        update = new - old
        return update + (new - (old + update))

    return jax.tree.map(of_leaf, new_params, params)
