"""Optimizers x seeds on one task: curves on the same initial params and mini-batches."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.base import Batch, Key, Params, Split, Task, TaskFamily, single
from metaopt.records import Curves
from metaopt.rollouts import mean_loss, windowed

TRAIN_SAMPLE = 20  # mini-batches of the training split on which `train_loss` is measured


class Recorder(NamedTuple):
    """What is recorded of a run.

    Attributes:
      split: where loss and accuracy are measured.
      every: windows between two measurements.
      fields: of the optimizer's state, recorded after each window.
      train: also measure the loss on a fixed sample of the training split.
      counts: the state counts its own ``gradient_evals`` (guards do); otherwise one a step.
    """

    split: Split = "test"
    every: int = 1
    fields: tuple[str, ...] = ()
    train: bool = False
    counts: bool = False


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
    """
    tx: Any = make(num_steps) if guard else windowed(make(num_steps))
    recorder = Recorder(split, measure_every, tuple(diagnostics), measure_train, guard)
    sizes = getattr(tx, "window", (window, window))
    start = begin(task, keys)
    return run(lambda _: tx, (), start, recorder, num_steps=num_steps, window=window, sizes=sizes)


class Runs(NamedTuple):
    """R runs at their start.

    Attributes:
      family: the tasks.
      task_params, params: which task a run is, and where it starts, ``[R, ...]``.
      keys: of the mini-batches, ``[S]``; run r uses number ``r % S``.
    """

    family: TaskFamily
    task_params: Any
    params: Params
    keys: Key


def begin(task: Task | TaskFamily, keys: Key, *, copies: int = 1) -> Runs:
    """The starts of ``copies * len(keys)`` runs; each copy of a seed starts alike."""
    family = task if isinstance(task, TaskFamily) else single(task)
    starts = [_start(family, key) for key in keys]  # one by one: compiled for any number
    task_params, params, k_batches = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    task_params, params = _tile((task_params, params), copies)
    return Runs(family, task_params, params, k_batches)


def run(
    tx_of: Callable[[Any], Any],
    points: Any,
    runs: Runs,
    recorder: Recorder,
    *,
    num_steps: int,
    window: int,
    sizes: tuple[int, int] | None = None,
) -> Curves:
    """Runs ``tx_of(point)``, in window form, from each start; `points` are arrays ``[R, ...]``.

    A window takes `window` optimizer steps and is given `sizes` training and validation
    mini-batches (`window` of both unless told otherwise).
    """
    unit = window * recorder.every
    if num_steps < 1 or num_steps % unit:
        raise ValueError(
            f"evaluate: num_steps must be a positive multiple of window={window} x "
            f"measure_every={recorder.every}, got {num_steps}."
        )
    num_train, num_eval = sizes or (window, window)
    number = jax.tree.leaves(runs.params)[0].shape[0]
    copies = number // len(runs.keys)
    init, advance = _programs(tx_of, runs.family, recorder)
    measure = partial(_measure, runs.family, recorder.split)
    draw = lambda count, keys: _tile(_draw(runs.family, count, runs.task_params, keys), copies)

    state = init(points, runs.params)
    sample = draw(TRAIN_SAMPLE, runs.keys) if recorder.train else None
    measured = [measure(runs.task_params, runs.params, sample)]
    params, seen, seconds = runs.params, [], [0.0]
    window_keys = jax.vmap(lambda k: jax.random.split(k, (num_steps // window, 2)))(runs.keys)
    for index in range(num_steps // window):
        k_train, k_eval = window_keys[:, index, 0], window_keys[:, index, 1]
        batches = [draw(window, k_train), draw(num_eval, k_eval)]
        if num_train > window:  # those of the steps come first, the same for all optimizers
            more = draw(num_train - window, jax.vmap(lambda k: jax.random.fold_in(k, 1))(k_train))
            batches[0] = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), batches[0], more)
        arguments = (points, runs.task_params, params, state, *batches)
        if not index:
            jax.block_until_ready(advance(*arguments))  # compiles, outside of the clock
        jax.block_until_ready(batches)
        started = time.perf_counter()
        params, state, fields = jax.block_until_ready(advance(*arguments))
        seconds.append((time.perf_counter() - started) / number)
        seen.append(fields)
        if (index + 1) % recorder.every == 0:
            measured.append(measure(runs.task_params, params, sample))
    return _curves(measured, seen, np.cumsum(seconds), recorder, window)


def _programs(tx_of: Callable[[Any], Any], family: TaskFamily, recorder: Recorder):
    """Compiled over all runs: a first state, one window."""

    def advance(point, task_params, params, state, train_batches, eval_batches):
        updates, state = tx_of(point).update(
            None,
            state,
            params,
            loss_fn=family.task(task_params).loss,
            train_batches=train_batches,
            eval_batches=eval_batches,
        )
        params = optax.apply_updates(params, updates)
        names = (*recorder.fields, *(("gradient_evals",) if recorder.counts else ()))
        return params, state, {name: optax.tree.get(state, name) for name in names}

    init = lambda point, params: tx_of(point).init(params)
    return tuple(jax.jit(jax.vmap(program)) for program in (init, advance))


def _curves(measured, seen, seconds, recorder: Recorder, window: int) -> Curves:
    loss, accuracy, train = (
        np.stack(x, axis=1) for x in zip(*jax.device_get(measured), strict=True)
    )
    seen = jax.device_get(seen)
    windows = window * np.arange(1, len(seen) + 1)
    state = {name: np.stack([s[name] for s in seen], axis=1) for name in recorder.fields}
    evals = windows
    if recorder.counts:  # the same for all seeds, but for a guard that grows its window
        evals = np.array([np.max(s["gradient_evals"]) for s in seen])
    at = slice(None, None, recorder.every)
    from_zero = lambda x: np.concatenate([[0], x])[at]
    return Curves(
        steps=from_zero(windows), grad_evals=from_zero(evals), seconds=seconds[at],
        loss=loss, accuracy=accuracy, train_loss=train, windows=windows, state=state,
    )  # fmt: skip


# What does not depend on the optimizer is compiled once per task. Random bits take XLA longer to
# compile than the optimizers that are compared, and under `vmap` longer still.


@partial(jax.jit, static_argnums=(0, 1))
def _measure(family: TaskFamily, split: Split, task_params: Any, params: Params, sample: Any):
    """Loss and accuracy on a split, and the loss on a sample of another, ``[R]`` each."""

    def one(task_params, params, sample):
        task = family.task(task_params)
        whole = task.whole(split)
        accuracy = task.accuracy(params, whole) if task.accuracy else jnp.nan
        train = jnp.nan if sample is None else mean_loss(task.loss, params, sample)
        return task.loss(params, whole), jnp.asarray(accuracy), jnp.asarray(train)

    return jax.vmap(one)(task_params, params, sample)


@partial(jax.jit, static_argnums=0)
def _start(family: TaskFamily, key: Key) -> tuple[Any, Params, Key]:
    """A task, its initial params, and a key for the rest of the run."""
    k_task, k_init, k_rest = jax.random.split(key, 3)
    task_params = family.sample(k_task)
    return task_params, family.task(task_params).init(k_init), k_rest


@partial(jax.jit, static_argnums=(0, 1))
def _draw(family: TaskFamily, number: int, task_params: Any, keys: Key) -> Batch:
    """`number` training mini-batches per key, ``[S, number, ...]``."""
    task_params = jax.tree.map(lambda x: x[: len(keys)], task_params)
    draw = lambda pair: family.task(pair[0]).sample(pair[1], (number,))
    return jax.lax.map(draw, (task_params, keys))


@partial(jax.jit, static_argnums=1)
def _tile(tree: Any, copies: int) -> Any:
    """``[S, ...] -> [copies * S, ...]``."""
    return jax.tree.map(lambda x: jnp.tile(x, (copies, *[1] * (x.ndim - 1))), tree)
