"""Curves of optimizers on one task, from the same initial params and mini-batches."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from metaopt import guards
from metaopt.core import cpu, memory
from metaopt.core.rollouts import (
    WithModelState,
    held_model_state,
    init_state,
    mean_loss,
    windowed,
)
from metaopt.core.types import (
    Batch,
    Key,
    Keys,
    Params,
    Split,
    Task,
    TaskFamily,
    WindowForm,
    loss_arguments,
    single,
)
from metaopt.evaluation.records import Curves
from metaopt.guards import Guard

TRAIN_SAMPLE = 20  # mini-batches of the training split on which `train_loss` is measured
EVALS = "gradient_evals"  # the field in which guards count gradient evaluations
ADVICE = "give fewer seeds, which run side by side, or a smaller task"  # where memory is too small
LONG = 10_000_000  # steps x parameters of all runs, above which compilation is the smaller cost

# (state, params) -> params at which an optimizer is judged, where it is not at its params
EvalParams = Callable[[Any, Params], Params]


class Adjustable(NamedTuple):
    """A transformation that is a function of arrays, and is compiled once for all their values.

    Attributes:
      make: ``arrays -> transformation``.
      arrays: ``num_steps -> arrays``.
      eval_params: where it is judged, or None: at its params.
    """

    make: Callable[[Any], optax.GradientTransformation]
    arrays: Callable[[int], Any]
    eval_params: EvalParams | None = None

    def __call__(self, num_steps: int) -> optax.GradientTransformation:
        return self.make(self.arrays(num_steps))


class Recorder(NamedTuple):
    """What is recorded of a run.

    Attributes:
      split: where loss and accuracy are measured.
      every: windows between two measurements.
      fields: names of fields of the optimizer's state, recorded after each window.
      train: also measure the loss on a fixed sample of the training split.
    """

    split: Split = "test"
    every: int = 1
    fields: tuple[str, ...] = ()
    train: bool = False


def evaluate(
    make: Callable[[int], optax.GradientTransformation],
    task: Task | TaskFamily,
    *,
    num_steps: int,
    keys: Keys,
    window: int = 10,
    measure_every: int = 1,
    split: Split = "test",
    diagnostics: Sequence[str] = (),
    measure_train: bool = False,
    eval_params: EvalParams | None = None,
    held_out: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Curves:
    """Runs an optimizer from each key on a stream of mini-batches.

    A key fixes the task (of a family), the initial params and all mini-batches, independently of
    the optimizer, so that optimizers are compared on the same runs. A guard takes the stream as
    users run it: mini-batches on which it validates are not trained on. Only a guard in window form
    (`guards.in_windows`), as in papers, is given additional mini-batches to validate on.

    Args:
      make: ``num_steps -> transformation``.
      task: the problem, or a distribution of problems.
      num_steps: mini-batches of a run, a multiple of ``window * measure_every``.
      keys: one PRNG key per seed, ``[S]``.
      window: mini-batches per call of a compiled program; diagnostics are recorded after each.
      measure_every: windows between two measurements.
      split: where loss and accuracy are measured.
      diagnostics: fields of the optimizer's state to record after each window.
      measure_train: also measure the loss on a fixed sample of the training split.
      eval_params: where the optimizer is judged. None: where `make` says if it is `Adjustable`, and
        else at its params.
      held_out: give a guard an `eval_fn`, the task's `eval_loss` on the validation split: with
        windows of n mini-batches, on the whole split in n parts, or on n mini-batches of it, drawn
        anew for each `window`, if these are fewer data. No guard sees the test split.
      progress: called with the number of windows done, after each window.

    Returns:
      The curves of all seeds.

    Raises:
      ValueError: `num_steps` is no multiple as above, or `held_out` with a guard in window form.
      MemoryError: a measurement or a window needs more memory than there is.
    """
    recorder = Recorder(
        split=split,
        every=measure_every,
        fields=tuple(diagnostics),
        train=measure_train,
    )
    starts, sizes = begin(task, keys), None
    if isinstance(make, Adjustable):
        tx_of, point = make.make, make.arrays(num_steps)
        eval_params = eval_params or make.eval_params
    else:
        tx: Any = make(num_steps)
        tx_of, point = (lambda _: tx), ()
        if isinstance(tx, WindowForm):
            if held_out:
                raise ValueError("evaluate: held_out takes a guard, not its window form.")
            sizes = getattr(tx, "window", (window, window))
    return run(
        tx_of,
        [point],
        starts,
        recorder,
        num_steps=num_steps,
        window=window,
        sizes=sizes,
        eval_params=eval_params,
        held_out=held_out,
        progress=progress,
    )


class Starts(NamedTuple):
    """S runs before their first step.

    Attributes:
      family: the distribution of tasks.
      task_params: which task each run is, ``[S, ...]``.
      params: where each run starts, ``[S, ...]``.
      model_state: the model state there, ``[S, ...]``, or None.
      keys: of the mini-batches, ``[S]``.
    """

    family: TaskFamily
    task_params: Any
    params: Params
    model_state: Any
    keys: Keys


def begin(task: Task | TaskFamily, keys: Keys) -> Starts:
    """The starts of the runs from ``keys [S]``."""
    family = task if isinstance(task, TaskFamily) else single(task)
    return Starts(family, *_stack([_start(family, key) for key in keys]))


def start_losses(starts: Starts, split: Split) -> np.ndarray:
    """The losses of the initial params on a split, ``[S]``."""
    loss, _, _ = _measure_first(starts, None, split)
    return np.asarray(loss)


def _measure_first(starts: Starts, sample: Batch | None, split: Split) -> Any:
    """What `_measure` returns of the initial params, if there is enough memory for it."""
    arguments = loss_arguments(starts.params, starts.model_state)
    args = (starts.family, starts.task_params, arguments, sample)
    _check_memory(f"a measurement on the {split} split", _measure, *args, split=split)
    return _measure(*args, split=split)


def run(
    tx_of: Callable[[Any], Any],
    points: Sequence[Any],
    starts: Starts,
    recorder: Recorder,
    *,
    num_steps: int,
    window: int,
    sizes: tuple[int, int] | None = None,
    eval_params: EvalParams | None = None,
    held_out: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Curves:
    """Runs ``tx_of(point)`` from each start, for each of P points (pytrees of arrays).

    All points take the same mini-batches, window by window, and share one compiled program.

    Args:
      tx_of: ``point -> transformation``.
      points: arguments of `tx_of`.
      starts: S starts.
      recorder: what is recorded.
      num_steps: steps per run.
      window: optimizer steps per window.
      sizes: training and additional validation mini-batches of a guard in window form.
      eval_params: where the optimizer is judged; None: at its params.
      held_out: see `evaluate`.
      progress: called with the number of windows done, after each window.

    Returns:
      Curves with P * S runs, point by point.

    Raises:
      ValueError: `num_steps` is not a multiple of the steps between two measurements.
      MemoryError: a measurement or a window needs more memory than there is.
    """
    unit = window * recorder.every
    if num_steps < 1 or num_steps % unit:
        raise ValueError(
            f"evaluate: num_steps must be a positive multiple of window={window} x "
            f"measure_every={recorder.every}, got {num_steps}."
        )
    family, task_params = starts.family, starts.task_params
    long = num_steps * len(points) * optax.tree.size(starts.params) > LONG
    init, advance = _optimizer_programs(tx_of, recorder, long=long, held_out=held_out)
    measure = partial(_measure, split=recorder.split)
    tx = tx_of(points[0])
    period = tx.period if isinstance(tx, Guard) else None
    num_held_out = (period or window) if held_out else 0
    batches = _mini_batches(starts, num_steps // window, window, sizes, num_held_out)

    params = [starts.params] * len(points)
    states = [init(point, starts.params, starts.model_state) for point in points]
    sample = _draw_all(starts, TRAIN_SAMPLE, starts.keys) if recorder.train else None
    first = _measure_first(starts, sample, recorder.split)
    measured = [[first] * len(points)]
    fields, seconds = [], [0.0]
    for done, (train_batches, eval_batches) in enumerate(batches, start=1):
        given = (task_params, train_batches, eval_batches)
        jax.block_until_ready(given)
        # Guards are at one position of their window in all runs. As one number, it decides under
        # `vmap` which phase runs; as one number per run, all phases would run.
        position = None if period is None else jnp.int32((done - 1) * window % period)
        if done == 1:  # compile before the clock starts
            shared = (family, points[0], position)
            _check_memory("a window", advance, shared, params[0], states[0], *given)
            jax.block_until_ready(advance(shared, params[0], states[0], *given))
        started = time.perf_counter()
        results = [
            advance((family, point, position), *carried, *given)
            for point, *carried in zip(points, params, states, strict=True)
        ]
        jax.block_until_ready(results)
        seconds.append((time.perf_counter() - started) / len(points) / len(starts.keys))
        params, states, state_fields = (list(part) for part in zip(*results, strict=True))
        fields.append(state_fields)
        if done % recorder.every == 0:
            now = [
                loss_arguments(
                    _at_eval_params(state, p, eval_params=eval_params) if eval_params else p,
                    held_model_state(state),
                )
                for p, state in zip(params, states, strict=True)
            ]
            measured.append([measure(family, task_params, each, sample) for each in now])
        if progress:
            progress(done)
    return _curves(measured, fields, np.cumsum(seconds), recorder, window)


def _check_memory(what: str, program: Any, *args: Any, **static: Any) -> None:
    """Raises `MemoryError` if a program needs more memory than there is; compiles it."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(args)):
        return
    needed = cpu.memory_of(program, *args, **static)
    memory.check(f"{what} of all seeds", needed, memory.available(jax.devices()[0]), ADVICE)


def _mini_batches(
    starts: Starts,
    num_windows: int,
    window: int,
    sizes: tuple[int, int] | None,
    num_held_out: int,
) -> Iterator[tuple[Batch, Batch]]:
    """Training mini-batches ``[S, n, ...]`` of each window, and those that only decide.

    The latter are `num_held_out` of the validation split, or those of `sizes`.
    """
    keys = jax.vmap(lambda key: jax.random.split(key, (num_windows, 2)))(starts.keys)
    for index in range(num_windows):
        k_train, k_eval = keys[:, index, 0], keys[:, index, 1]
        train = _draw_all(starts, window, k_train)
        if (
            sizes and sizes[0] > window
        ):  # the first `window` of them are the same for all optimizers
            more = jax.vmap(lambda k: jax.random.fold_in(k, 1))(k_train)
            more = _draw_all(starts, sizes[0] - window, more)
            train = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), train, more)
        decide = None
        if num_held_out:
            decide = _draw_all(starts, num_held_out, k_eval, draw=_draw_held_out)
        elif sizes and sizes[1]:
            decide = _draw_all(starts, sizes[1], k_eval)
        yield train, decide


def _draw_all(
    starts: Starts, number: int, keys: Keys, draw: Callable[..., Batch] | None = None
) -> Batch:
    """`number` mini-batches for each run, ``[S, number, ...]``; for training, or by `draw`."""
    draw = draw or _draw
    return _stack(
        [
            draw(starts.family, _index(starts.task_params, run), key, number=number)
            for run, key in enumerate(keys)
        ]
    )


def _curves(
    measured: Sequence[Sequence[Any]],
    fields: Sequence[Sequence[Any]],
    seconds: np.ndarray,
    recorder: Recorder,
    window: int,
) -> Curves:
    """Curves from what was measured, and the fields of the states, per time and point.

    Args:
      measured: loss, accuracy and training loss, ``[S]`` each, per time and point.
      fields: name -> values ``[S, ...]``, per window and point.
      seconds: per window.
      recorder: as in `run`.
      window: as in `run`.
    """

    def by_run(times: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        return np.stack([np.concatenate(points) for points in times], axis=1)

    def metric(index: int) -> np.ndarray:
        return by_run([[point[index] for point in points] for points in measured])

    def field(name: str) -> np.ndarray:
        return by_run([[point[name] for point in points] for points in fields])

    measured, fields = jax.device_get((measured, fields))
    windows = window * np.arange(1, len(fields) + 1)
    evals = windows
    if EVALS in fields[0][0]:  # of a guard: the largest of all seeds
        evals = np.max(field(EVALS), axis=0)
    at = slice(None, None, recorder.every)
    return Curves(
        steps=np.concatenate([[0], windows])[at],
        grad_evals=np.concatenate([[0], evals])[at],
        seconds=seconds[at],
        loss=metric(0),
        accuracy=metric(1),
        train_loss=metric(2),
        windows=windows,
        state={name: field(name) for name in recorder.fields},
    )


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _index(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


# Compilation is most of a short evaluation. Programs that do not depend on the optimizer are
# compiled once per family; the optimizer's own, once for all points of a grid.


@lru_cache(maxsize=1)  # an extension of a grid runs the programs of the grid again
def _optimizer_programs(
    tx_of: Callable[[Any], Any], recorder: Recorder, *, long: bool, held_out: bool
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """First states, and one window, of all seeds: `init` and `advance`."""

    def init(point: Any, params: Params, model_state: Any) -> Any:
        return init_state(_on_windows(tx_of(point)), params, model_state)

    def advance(shared, params, state, task_params, train_batches, eval_batches):
        family, point, position = shared
        if position is not None:
            state = state._replace(position=position)
        task = family.task(task_params)
        updates, state = _on_windows(tx_of(point)).update(
            None,
            state,
            params,
            loss_fn=task.loss,
            train_batches=train_batches,
            eval_batches=eval_batches,
            eval_fn=task.eval_loss if held_out else None,
        )
        params = optax.apply_updates(params, updates)
        recorded = {name: optax.tree.get(state, name) for name in recorder.fields}
        with contextlib.suppress(ValueError):  # no guard
            recorded[EVALS] = guards.info(state).gradient_evals
        return params, state, recorded

    return cpu.jit(jax.vmap(init, in_axes=(None, 0, 0))), cpu.for_all(advance, long=long)


def _on_windows(tx: Any) -> WindowForm:
    """`tx`, called once for several mini-batches."""
    return tx if isinstance(tx, WindowForm) else windowed(tx)


@partial(cpu.jit, quick=True, static_argnames="split")
def _measure(
    family: TaskFamily, task_params: Any, arguments: tuple[Any, ...], sample: Batch, *, split: Split
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss and accuracy on a split, and the loss on a sample of mini-batches, ``[S]`` each.

    All are measured in evaluation mode; `arguments` are the params, and the model state if any.
    """

    def of_run(task_params: Any, arguments: tuple[Any, ...], sample: Batch):
        task = family.task(task_params)
        whole = task.whole(split)
        accuracy = task.accuracy(*arguments, whole) if task.accuracy else jnp.nan
        train = jnp.nan
        if sample is not None:
            train = mean_loss(lambda given, batch: task.eval_loss(*given, batch), arguments, sample)
        return task.eval_loss(*arguments, whole), jnp.asarray(accuracy), jnp.asarray(train)

    return jax.vmap(of_run)(task_params, arguments, sample)


@partial(cpu.jit, quick=True, static_argnames="eval_params")
def _at_eval_params(state: Any, params: Params, *, eval_params: EvalParams) -> Params:
    """`eval_params` of all seeds, ``[S, ...]``."""
    state = state.state if isinstance(state, WithModelState) else state
    return jax.vmap(eval_params)(state, params)


@cpu.jit
def _start(family: TaskFamily, key: Key) -> tuple[Any, Params, Any, Key]:
    """Task params, initial params and model state, and a key for the rest of the run."""
    k_task, k_init, k_rest = jax.random.split(key, 3)
    task_params = family.sample(k_task)
    task = family.task(task_params)
    return task_params, task.init(k_init), task.init_model_state(k_init), k_rest


@partial(cpu.jit, static_argnames="number")
def _draw(family: TaskFamily, task_params: Any, key: Key, *, number: int) -> Batch:
    """Training mini-batches ``[number, ...]``."""
    return family.task(task_params).sample(key, (number,))


@partial(cpu.jit, static_argnames="number")
def _draw_held_out(family: TaskFamily, task_params: Any, key: Key, *, number: int) -> Batch:
    """The whole validation split in `number` parts; `number` mini-batches if these are fewer data.

    The whole split is better than as many examples of it, drawn with replacement. A remainder of
    less than `number` examples is left out.
    """
    task = family.task(task_params)
    whole, drawn = task.whole("valid"), task.sample(key, (number,), "valid")
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(whole)}
    length = min(lengths)[0] if len(lengths) == 1 and () not in lengths else 0
    # Where a split is no larger than a mini-batch, it is no list of examples.
    is_list = length >= number and optax.tree.size(whole) * number > optax.tree.size(drawn)
    if not is_list or optax.tree.size(whole) > optax.tree.size(drawn):
        return drawn
    each = length // number
    # Part i has the examples i, i + number, ...: a split may be sorted by class.
    cut = lambda leaf: leaf[: each * number].reshape(each, number, *leaf.shape[1:])
    return jax.tree.map(lambda leaf: jnp.swapaxes(cut(jnp.asarray(leaf)), 0, 1), whole)
