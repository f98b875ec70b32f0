"""Optimizers x seeds on one task: curves on the same initial params and mini-batches."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.core.compilation import compiled, for_all
from metaopt.core.rollouts import mean_loss, windowed
from metaopt.core.types import Batch, Key, Params, Split, Task, TaskFamily, single
from metaopt.evaluation.records import Curves

TRAIN_SAMPLE = 20  # mini-batches of the training split on which `train_loss` is measured
EVALS = "gradient_evals"  # the field in which guards count them
LONG = 10_000_000  # steps x parameters of all runs, above which compilation is the lesser part


class Adjustable(NamedTuple):
    """A transformation that is a function of arrays; for all of them it is compiled once.

    Attributes:
      make: ``arrays -> transformation``.
      arrays: ``num_steps -> arrays``.
    """

    make: Callable[[Any], optax.GradientTransformation]
    arrays: Callable[[int], Any]

    def __call__(self, num_steps: int) -> optax.GradientTransformation:
        return self.make(self.arrays(num_steps))


class Recorder(NamedTuple):
    """What is recorded of a run.

    Attributes:
      split: where loss and accuracy are measured.
      every: windows between two measurements.
      fields: of the optimizer's state, recorded after each window.
      train: also measure the loss on a fixed sample of the training split.
      guard: the optimizer is in window form, and its state counts its own ``gradient_evals``;
        otherwise it takes single steps, of one gradient each.
    """

    split: Split = "test"
    every: int = 1
    fields: tuple[str, ...] = ()
    train: bool = False
    guard: bool = False


def evaluate(
    make: Callable[[int], optax.GradientTransformation],
    task: Task | TaskFamily,
    *,
    num_steps: int,
    keys: Key,
    window: int = 10,
    measure_every: int = 1,
    split: Split = "test",
    guard: bool = False,
    diagnostics: Sequence[str] = (),
    measure_train: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Curves:
    """Runs an optimizer from each key, in windows of mini-batches, all seeds in one `vmap`.

    A key fixes the task (of a family), the initial params and all mini-batches, whatever the
    optimizer, so that optimizers are compared on the same runs. Guards get `window` further
    training mini-batches per window to decide on.

    Args:
      make: ``num_steps -> transformation``.
      task: the problem, or a distribution of problems.
      num_steps: steps per run; whole windows.
      keys: one PRNG key per seed, ``[S]``.
      window: steps per window (of guards, too).
      measure_every: windows between two measurements.
      split: where loss and accuracy are measured.
      guard: `make` gives a guard (window form) rather than a per-step transformation.
      diagnostics: fields of the optimizer's state to record after each window.
      measure_train: also measure the loss on a fixed sample of the training split.
      progress: told the number of windows done, after each.
    """
    recorder = Recorder(split, measure_every, tuple(diagnostics), measure_train, guard)
    start, sizes = begin(task, keys), (window, window)
    if isinstance(make, Adjustable) and not guard:
        tx_of, point = make.make, make.arrays(num_steps)
    else:
        tx: Any = make(num_steps)
        tx_of, point = (lambda _: tx), ()
        sizes = getattr(tx, "window", sizes) if guard else sizes
    return run(
        *(tx_of, [point], start, recorder),
        num_steps=num_steps,
        window=window,
        sizes=sizes,
        progress=progress,
    )


class Runs(NamedTuple):
    """S runs at their start.

    Attributes:
      family: the tasks.
      task_params, params: which task a run is, and where it starts, ``[S, ...]``.
      keys: of the mini-batches, ``[S]``.
    """

    family: TaskFamily
    task_params: Any
    params: Params
    keys: Key


def begin(task: Task | TaskFamily, keys: Key) -> Runs:
    """The starts of the runs from ``keys [S]``."""
    family = task if isinstance(task, TaskFamily) else single(task)
    return Runs(family, *_stacked([_start(family)(key) for key in keys]))


def losses(runs: Runs, split: Split) -> np.ndarray:
    """Those of the runs' params on a split, ``[S]``."""
    return np.asarray(_measure(runs.family, split)(runs.task_params, runs.params, None)[0])


def run(
    tx_of: Callable[[Any], Any],
    points: Sequence[Any],
    runs: Runs,
    recorder: Recorder,
    *,
    num_steps: int,
    window: int,
    sizes: tuple[int, int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Curves:
    """Runs ``tx_of(point)`` from each start, for each of P points (pytrees of arrays).

    The points take the same mini-batches, window by window, through one program.

    Args:
      tx_of, points: the optimizers; a guard in window form if `recorder` says so.
      runs: S starts.
      recorder: what is recorded.
      num_steps: steps per run.
      window: optimizer steps per window.
      sizes: training and validation mini-batches that a window is given; `window` of both unless
        told otherwise.
      progress: told the number of windows done, after each.

    Returns:
      Curves with P * S runs, point by point.
    """
    unit = window * recorder.every
    if num_steps < 1 or num_steps % unit:
        raise ValueError(
            f"evaluate: num_steps must be a positive multiple of window={window} x "
            f"measure_every={recorder.every}, got {num_steps}."
        )
    sizes = sizes or (window, window)
    long = num_steps * len(points) * optax.tree.size(runs.params) > LONG
    init, advance = _programs(tx_of, runs.family, recorder.fields, recorder.guard, long)
    measure = _measure(runs.family, recorder.split)
    batches = _mini_batches(runs, num_steps // window, window, sizes, recorder.guard)

    params = [runs.params] * len(points)
    states = [init(point, runs.params) for point in points]
    sample = _drawn(runs, TRAIN_SAMPLE, runs.keys) if recorder.train else None
    measured = [[measure(runs.task_params, runs.params, sample)] * len(points)]
    seen, seconds = [], [0.0]
    for done, given in enumerate(batches, start=1):
        shared = jax.block_until_ready((runs.task_params, *given))
        if done == 1:  # compiles, outside of the clock
            jax.block_until_ready(advance(points[0], params[0], states[0], *shared))
        started = time.perf_counter()
        after = [advance(*own, *shared) for own in zip(points, params, states, strict=True)]
        params, states, fields = map(list, zip(*jax.block_until_ready(after), strict=True))
        seconds.append((time.perf_counter() - started) / len(points) / len(runs.keys))
        seen.append(fields)
        if done % recorder.every == 0:
            measured.append([measure(runs.task_params, p, sample) for p in params])
        if progress:
            progress(done)
    return _curves(measured, seen, np.cumsum(seconds), recorder, window)


def _mini_batches(
    runs: Runs, num_windows: int, window: int, sizes: tuple[int, int], guard: bool
) -> Iterator[tuple[Batch, Batch]]:
    """Training and validation mini-batches ``[S, n, ...]`` of each window, the latter of guards."""
    keys = jax.vmap(lambda key: jax.random.split(key, (num_windows, 2)))(runs.keys)
    for index in range(num_windows):
        k_train, k_eval = keys[:, index, 0], keys[:, index, 1]
        train = _drawn(runs, window, k_train)
        if sizes[0] > window:  # those of the steps come first, the same for all optimizers
            more = jax.vmap(lambda k: jax.random.fold_in(k, 1))(k_train)
            more = _drawn(runs, sizes[0] - window, more)
            train = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), train, more)
        yield train, _drawn(runs, sizes[1], k_eval) if guard else None


def _drawn(runs: Runs, number: int, keys: Key) -> Batch:
    """So many training mini-batches for each run, ``[S, number, ...]``."""
    draw = _draw(runs.family, number)
    task_params = [jax.tree.map(lambda x, i=i: x[i], runs.task_params) for i in range(len(keys))]
    return _stacked([draw(*one) for one in zip(task_params, keys, strict=True)])


def _curves(measured, seen, seconds, recorder: Recorder, window: int) -> Curves:
    """`measured`, `seen`: per time and point, arrays ``[S]`` and fields ``[S, ...]``."""
    whole = lambda parts: np.stack([np.concatenate(points) for points in parts], axis=1)
    measured, seen = jax.device_get((measured, seen))
    metric = lambda i: whole([[point[i] for point in points] for points in measured])
    field = lambda name: whole([[point[name] for point in points] for points in seen])
    windows = window * np.arange(1, len(seen) + 1)
    evals = windows
    if recorder.guard:  # the same for all seeds, but for a guard that grows its window
        evals = np.max(field(EVALS), axis=0)
    at = slice(None, None, recorder.every)
    from_zero = lambda x: np.concatenate([[0], x])[at]
    return Curves(
        steps=from_zero(windows), grad_evals=from_zero(evals), seconds=seconds[at],
        loss=metric(0), accuracy=metric(1), train_loss=metric(2), windows=windows,
        state={name: field(name) for name in recorder.fields},
    )  # fmt: skip


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


# Compilation is most of a short evaluation, so that programs are used again wherever they can be:
# what does not depend on the optimizer once per task, and what does once for all points of a grid.


@lru_cache(maxsize=8)
def _programs(tx_of: Callable, family: TaskFamily, fields: tuple, guard: bool, long: bool):
    """Compiled over all seeds: a first state, one window."""
    names = (*fields, *((EVALS,) if guard else ()))
    window_form = lambda point: tx_of(point) if guard else windowed(tx_of(point))

    def init(point, params):
        return window_form(point).init(params)

    def advance(point, params, state, task_params, train_batches, eval_batches):
        tx: Any = window_form(point)
        loss_fn = family.task(task_params).loss
        batches = {"train_batches": train_batches, "eval_batches": eval_batches}
        updates, state = tx.update(None, state, params, loss_fn=loss_fn, **batches)
        params = optax.apply_updates(params, updates)
        return params, state, {name: optax.tree.get(state, name) for name in names}

    return compiled(jax.vmap(init, (None, 0))), for_all(advance, long=long)


@lru_cache(maxsize=8)
def _measure(family: TaskFamily, split: Split):
    """Loss and accuracy on a split, and the loss on a sample of another, ``[S]`` each."""

    def measure(task_params, params, sample):
        task = family.task(task_params)
        whole = task.whole(split)
        accuracy = task.accuracy(params, whole) if task.accuracy else jnp.nan
        train = jnp.nan if sample is None else mean_loss(task.loss, params, sample)
        return task.loss(params, whole), jnp.asarray(accuracy), jnp.asarray(train)

    return compiled(jax.vmap(measure), quick=True)


@lru_cache(maxsize=8)
def _start(family: TaskFamily):
    """``key -> `` a task, its initial params, and a key for the rest of the run."""

    def start(key: Key) -> tuple[Any, Params, Key]:
        k_task, k_init, k_rest = jax.random.split(key, 3)
        task_params = family.sample(k_task)
        return task_params, family.task(task_params).init(k_init), k_rest

    return compiled(start)


@lru_cache(maxsize=8)
def _draw(family: TaskFamily, number: int):
    """``(task_params, key) ->`` so many training mini-batches, ``[number, ...]``."""

    def draw(task_params: Any, key: Key) -> Batch:
        return family.task(task_params).sample(key, (number,))

    return compiled(draw)
