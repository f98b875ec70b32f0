"""Optimizers x seeds on one task: curves on the same initial params and mini-batches."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.base import Batch, Key, Params, Split, Task
from metaopt.rollouts import windowed


class Curves(NamedTuple):
    """What one optimizer did on one task; S seeds, W windows.

    Attributes:
      steps: optimizer steps taken before each measurement, ``[W + 1]``.
      loss, accuracy: on the whole split, ``[S, W + 1]``; accuracy is NaN where the task has none.
      state: the diagnostics asked for, name -> ``[S, W, ...]``.
    """

    steps: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    state: dict[str, np.ndarray]


def evaluate(
    make: Callable[[int], optax.GradientTransformation],
    task: Task,
    *,
    num_steps: int,
    keys: Key,
    window: int = 10,
    split: Split = "test",
    guard: bool = False,
    diagnostics: Sequence[str] = (),
) -> Curves:
    """Runs an optimizer from each key, in windows of mini-batches, all seeds in one `vmap`.

    A key fixes initial params and all mini-batches, whatever the optimizer, so that optimizers
    are compared on the same runs. Guards get `window` further training mini-batches per window
    to decide on.

    Args:
      make: ``num_steps -> transformation``.
      task: the problem.
      num_steps: steps per run; a multiple of `window`.
      keys: one PRNG key per seed, ``[S]``.
      window: steps between two measurements, and the window of guards.
      split: where loss and accuracy are measured.
      guard: `make` gives a guard (window form) rather than a per-step transformation.
      diagnostics: fields of the optimizer's state to record after each window.
    """
    if num_steps < 1 or num_steps % window:
        raise ValueError(
            f"evaluate: num_steps must be a positive multiple of window={window}, got {num_steps}."
        )
    tx: Any = make(num_steps) if guard else windowed(make(num_steps))
    whole = task.whole(split)

    def measure(params):
        accuracy = task.accuracy(params, whole) if task.accuracy else jnp.nan
        return task.loss(params, whole), jnp.asarray(accuracy)

    def one_window(params, state, train_batches, eval_batches):
        updates, state = tx.update(
            None,
            state,
            params,
            loss_fn=task.loss,
            train_batches=train_batches,
            eval_batches=eval_batches,
        )
        params = optax.apply_updates(params, updates)
        seen = {name: optax.tree.get(state, name) for name in diagnostics}
        return params, state, (measure(params), seen)

    params, k_rest = _starts(task, keys)
    state = jax.jit(jax.vmap(tx.init))(params)
    step = jax.jit(jax.vmap(one_window))
    records = [(jax.jit(jax.vmap(measure))(params), {})]
    window_keys = jax.vmap(lambda k: jax.random.split(k, num_steps // window))(k_rest)
    for k_window in jnp.moveaxis(window_keys, 1, 0):
        k_train, k_eval = jnp.moveaxis(jax.vmap(jax.random.split)(k_window), 1, 0)
        batches = (_draw(task, window, k) for k in (k_train, k_eval))
        params, state, record = step(params, state, *batches)
        records.append(record)
    measured, seen = zip(*jax.device_get(records), strict=True)
    loss, accuracy = (np.stack(values, axis=1) for values in zip(*measured, strict=True))
    states = {name: np.stack([s[name] for s in seen[1:]], axis=1) for name in diagnostics}
    steps = np.arange(0, num_steps + 1, window)
    return Curves(steps, loss, accuracy, states)


# Random bits take XLA longer to compile than the optimizers that are compared (and under `vmap`
# longer still): they are drawn in programs of their own, compiled once per task.


@partial(jax.jit, static_argnums=0)
def _starts(task: Task, keys: Key) -> tuple[Params, Key]:
    """Initial params of all seeds, stacked, and a key each for the rest of the run."""
    k_init, k_rest = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    return jax.lax.map(task.init, k_init), k_rest


@partial(jax.jit, static_argnums=(0, 1))
def _draw(task: Task, number: int, keys: Key) -> Batch:
    """`number` training mini-batches per key, ``[S, number, ...]``."""
    return jax.lax.map(lambda key: task.sample(key, (number,)), keys)


class Baseline(NamedTuple):
    """A hand-crafted optimizer and the grid it is tuned on.

    Attributes:
      name: how tables call it.
      make: ``schedule -> transformation``; a schedule maps the step count to a learning rate.
      schedules: name -> ``(lr, num_steps) -> schedule``; lr may be traced.
      rates: learning rates that are tried with each schedule.
    """

    name: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    schedules: Mapping[str, Callable[[Any, int], optax.Schedule]]
    rates: tuple[float, ...]

    def chosen(self, schedule: str, lr: float) -> Callable[[int], optax.GradientTransformation]:
        """``num_steps -> transformation`` for one point of the grid."""
        return lambda num_steps: self.make(self.schedules[schedule](lr, num_steps))


def tune(baseline: Baseline, task: Task, *, num_steps: int, keys: Key) -> dict[str, Any]:
    """Grid search on the "valid" split: the lowest mean final loss over the seeds wins.

    Returns:
      A record of the search as plain JSON data: the chosen ``schedule`` and ``lr``, and the loss
      of every point of the grid (inf where a run diverged).
    """
    valid = task.whole("valid")
    names = list(baseline.schedules)
    params, k_batches = _starts(task, keys)
    batches = _draw(task, num_steps, k_batches)

    def final_loss(which, lr, params, batches):
        schedules = [make(lr, num_steps) for make in baseline.schedules.values()]
        schedule = lambda count: jnp.stack([jnp.asarray(s(count)) for s in schedules])[which]
        tx: Any = windowed(baseline.make(schedule))
        updates, _ = tx.update(
            None, tx.init(params), params, loss_fn=task.loss, train_batches=batches
        )
        return task.loss(optax.apply_updates(params, updates), valid)

    # One program for the whole grid: [schedules, rates, seeds].
    over_seeds = jax.vmap(final_loss, (None, None, 0, 0))
    over_rates = jax.vmap(over_seeds, (None, 0, None, None))
    over_grid = jax.jit(jax.vmap(over_rates, (0, None, None, None)))
    losses = over_grid(jnp.arange(len(names)), jnp.asarray(baseline.rates), params, batches)
    losses = np.asarray(jnp.mean(losses, axis=2), np.float64)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    row, column = np.unravel_index(np.argmin(losses), losses.shape)
    return {
        "schedule": names[row],
        "lr": baseline.rates[column],
        "rates": list(baseline.rates),
        "grid": dict(zip(names, losses.tolist(), strict=True)),
        "runs": losses.size * len(keys),
    }
