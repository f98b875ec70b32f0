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
      make: ``(lr, num_steps) -> transformation`` per schedule name; lr may be traced.
      rates: learning rates that are tried with each schedule.
    """

    name: str
    make: Mapping[str, Callable[[Any, int], optax.GradientTransformation]]
    rates: tuple[float, ...]


def tune(
    baseline: Baseline, task: Task, *, num_steps: int, keys: Key
) -> tuple[Callable[[int], optax.GradientTransformation], dict[str, Any]]:
    """Grid search on the "valid" split: the lowest mean final loss over the seeds wins.

    Returns:
      ``num_steps -> transformation`` of the winner, and a record of the search: the chosen
      schedule and rate, and the loss of every point of the grid (inf where a run diverged).
    """
    valid = task.whole("valid")

    def final_loss(make, lr, params, batches):
        tx: Any = windowed(make(lr, num_steps))
        updates, _ = tx.update(
            None, tx.init(params), params, loss_fn=task.loss, train_batches=batches
        )
        return task.loss(optax.apply_updates(params, updates), valid)

    grid: dict[str, list[float]] = {}
    rates = jnp.asarray(baseline.rates)
    params, k_batches = _starts(task, keys)
    batches = _draw(task, num_steps, k_batches)
    for schedule, make in baseline.make.items():
        one = lambda lr, params, batches, make=make: final_loss(make, lr, params, batches)
        grid_losses = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None)))
        losses = jnp.mean(grid_losses(rates, params, batches), axis=1)
        grid[schedule] = [float(x) for x in jnp.where(jnp.isfinite(losses), losses, jnp.inf)]
    points = [(min(losses), schedule) for schedule, losses in grid.items()]
    schedule = min(points)[1]
    lr = baseline.rates[int(np.argmin(grid[schedule]))]
    record = {
        "schedule": schedule,
        "lr": lr,
        "rates": list(baseline.rates),
        "grid": grid,
        "runs": len(keys) * len(rates) * len(grid),
    }
    return lambda horizon: baseline.make[schedule](lr, horizon), record
