"""Time of one window of a guard, as a multiple of the time of the parts it consists of.

Measured: one jitted window of each guard (n_t training and n_c held-out mini-batches).
Reference: its parts (unrolls, losses, gradients), each compiled alone; their times are summed. A
round times everything once, and ratios are formed within rounds.

A window may cost less than the sum. Its unrolls do not depend on one another, so XLA runs them side
by side where threads are idle; parts that are timed one after the other cannot have that. The
second reference shows the difference: the same parts in one program, without a decision. What a
window takes beyond this program is the cost of the guard.

    python -m benchmarks windows [--out FILE]    # a few minutes on 2 cores
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from benchmarks.workload import images
from metaopt import guards
from metaopt.core.rollouts import mean_loss, unroll
from metaopt.core.types import Batch, LearnedOptimizer, Params, Task, Theta
from metaopt.optimizers import lstm, sgd
from metaopt.tasks import classification
from metaopt.tasks.networks import CNN, MLP

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP-20": lambda: MLP((20, 10), nn.sigmoid),
    "CNN-3": lambda: CNN(10),
}
# What a window consists of: the name of a part (see `_parts`), and how often it occurs.
IDEALS: dict[str, dict[str, int]] = {
    "lgl2o": {"learned": 1, "fallback": 1, "losses": 2},
    "race": {"learned": 1, "fallback": 1, "losses": 2},
    "gl2o": {"learned": 1, "fallback": 1},
    "smg": {"meta_gradient": 1, "adapted": 2, "losses": 2},
    "amg": {"meta_gradient": 1, "adapted": 1, "losses": 4, "gradient": 1},
}


def run(
    *,
    repeats: int = 7,
    n_t: int = 10,
    n_c: int = 10,
    batch_size: int = 128,
    networks: Sequence[str] = tuple(NETWORKS),
    hidden: int = 20,
) -> dict[str, Any]:
    """Measures one window of every guard and, interleaved with it, each of its parts alone.

    Args:
      repeats: rounds; a round times everything once.
      n_t: training mini-batches of a window; 10 in the papers.
      n_c: held-out mini-batches of a window; 10 in the papers.
      batch_size: images per mini-batch; 128 in the papers.
      networks: names in `NETWORKS`.
      hidden: units of the LSTM optimizer.

    Returns:
      ``{"device", "threads", "n_t", "n_c", "batch_size", "data", "repeats", "rows"}``; a row has
      "network", "params", "guard", "window_ms", "ideal_ms" (sum of its parts), "ratio" (of both),
      "together_ms" (its parts in one program), "overhead" (window over that) and "parts_ms".
    """
    data = images()
    rows = []
    for network in networks:
        task = classification(NETWORKS[network](), data, batch_size=batch_size)
        problem = _problem(task, lstm(hidden), n_t=n_t, n_c=n_c)
        rows += _network_rows(network, problem, repeats)
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "threads": os.cpu_count(),
        "n_t": n_t,
        "n_c": n_c,
        "batch_size": batch_size,
        "data": data.name,
        "repeats": repeats,
        "rows": rows,
    }


def table(record: dict[str, Any]) -> Table:
    """Renders a record of `run`."""
    table = Table(
        title=f"One window (n_t {record['n_t']}, n_c {record['n_c']}, batch {record['batch_size']}"
        f", {record['data']}) on {record['device']}, {record['threads']} threads"
    )
    table.add_column("network")
    table.add_column("parameters", justify="right")
    table.add_column("guard")
    for column in ("window ms", "sum of parts ms", "ratio", "over one program"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        table.add_row(
            row["network"],
            f"{row['params']:,}",
            row["guard"],
            f"{row['window_ms']:.1f}",
            f"{row['ideal_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['overhead']:.2f}",
        )
    return table


class _Problem(NamedTuple):
    """What the windows and their parts have in common.

    Attributes:
      task: the optimizee.
      learned: the learned optimizer.
      theta: its meta-parameters, untrained.
      params: where a window starts.
      train: ``2 n_t + 1`` training mini-batches.
      held_out: ``n_c`` mini-batches.
      n_t: steps of a window.
      n_c: mini-batches on which a guard compares.
    """

    task: Task
    learned: LearnedOptimizer
    theta: Theta
    params: Params
    train: Batch
    held_out: Batch
    n_t: int
    n_c: int

    def first(self, count: int) -> Batch:
        """The first `count` training mini-batches."""
        return jax.tree.map(lambda leaf: leaf[:count], self.train)


class _Part(NamedTuple):
    """A jitted function and the arguments that it is timed with."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        return self.fn(*self.args)


def _problem(task: Task, learned: LearnedOptimizer, *, n_t: int, n_c: int) -> _Problem:
    k_params, k_theta, k_train, k_held_out = jax.random.split(jax.random.key(0), 4)
    params = task.init(k_params)
    return _Problem(
        task=task,
        learned=learned,
        theta=learned.init(k_theta, params),
        params=params,
        train=task.sample(k_train, (2 * n_t + 1,)),
        held_out=task.sample(k_held_out, (n_c,)),
        n_t=n_t,
        n_c=n_c,
    )


def _network_rows(network: str, problem: _Problem, repeats: int) -> list[dict[str, Any]]:
    """One row per guard, all timed in the same rounds."""
    parts, windows = _parts(problem), _windows(problem)
    calls: dict[str, Callable[[], Any]] = dict(parts)
    for guard, ideal in IDEALS.items():
        calls[f"parts of {guard}"] = _together(parts, ideal)
    for guard, window in windows.items():
        calls[f"window of {guard}"] = window
    seconds = _time(calls, repeats)

    rows = []
    for guard in windows:
        ideal = IDEALS[guard]
        window = seconds[f"window of {guard}"]
        together = seconds[f"parts of {guard}"]
        total = sum(count * seconds[part] for part, count in ideal.items())
        rows.append(
            {
                "network": network,
                "params": int(optax.tree.size(problem.params)),
                "guard": guard,
                "window_ms": 1e3 * float(np.median(window)),
                "ideal_ms": 1e3 * float(np.median(total)),
                "ratio": float(np.median(window / total)),
                "together_ms": 1e3 * float(np.median(together)),
                "overhead": float(np.median(window / together)),
                "parts_ms": {part: 1e3 * float(np.median(seconds[part])) for part in ideal},
            }
        )
    return rows


def _parts(problem: _Problem) -> dict[str, _Part]:
    """What windows consist of, each compiled alone."""
    task, learned, params, theta = problem.task, problem.learned, problem.params, problem.theta
    train = problem.first(problem.n_t)
    next_batch = jax.tree.map(lambda leaf: leaf[problem.n_t], problem.train)

    def unrolled(tx: optax.GradientTransformation) -> _Part:
        """An unroll as inside a guard: the state is an argument and a result."""

        def fn(params, state):
            params, state, _ = unroll(tx, params, state, task.loss, train)
            return params, state

        return _Part(jax.jit(fn), (params, tx.init(params)))

    def adapted(theta, params):
        tx = learned.apply(theta)
        params, state, _ = unroll(tx, params, tx.init(params), task.loss, train, second_order=False)
        return params, learned.absorb(theta, state)

    def loss_after_unroll(pair):
        params, theta = adapted(*pair)
        return task.loss(params, next_batch), (params, theta)

    def held_out_loss(params):
        return mean_loss(task.loss, params, problem.held_out)

    def gradient(params):
        return jax.value_and_grad(task.loss)(params, next_batch)

    meta_gradient = jax.value_and_grad(loss_after_unroll, has_aux=True)
    return {
        "learned": unrolled(learned.apply(theta)),
        "fallback": unrolled(sgd().apply({})),
        "adapted": _Part(jax.jit(adapted), (theta, params)),
        "losses": _Part(jax.jit(held_out_loss), (params,)),
        "gradient": _Part(jax.jit(gradient), (params,)),
        "meta_gradient": _Part(jax.jit(meta_gradient), ((theta, params),)),
    }


def _together(parts: dict[str, _Part], ideal: dict[str, int]) -> _Part:
    """All parts of a window as one program."""
    members = [parts[name] for name, count in ideal.items() for _ in range(count)]
    # Each part gets copies: the compiler would merge two parts that have the same arguments.
    args = jax.tree.map(jnp.array, [part.args for part in members])

    def fn(args):
        return [part.fn(*own) for part, own in zip(members, args, strict=True)]

    return _Part(jax.jit(fn), (args,))


def _windows(problem: _Problem) -> dict[str, _Part]:
    """One window of every guard."""
    task, learned, theta = problem.task, problem.learned, problem.theta
    n_t, n_c = problem.n_t, problem.n_c

    def window(guard: guards.Guard, num_batches: int) -> _Part:
        batches, tx = problem.first(num_batches), guards.in_windows(guard)

        def fn(params, state):
            updates, state = tx.update(
                None,
                state,
                params,
                loss_fn=task.loss,
                train_batches=batches,
                eval_batches=problem.held_out,
            )
            return optax.apply_updates(params, updates), state

        return _Part(jax.jit(fn), (problem.params, tx.init(problem.params)))

    def amg_window(theta):
        return window(guards.amg(learned, theta, n_t=n_t, n_c=n_c), 2 * n_t + 1)

    # AMG back-propagates only where the learned steps lower the loss. Of two untrained optimizers
    # that step in opposite directions, one does.
    net = theta["net"]
    opposite = {**theta, "net": {**net, "readout": optax.tree.scale(-1.0, net["readout"])}}
    descending = amg_window(theta)
    if descending()[1].memory.used_gradient:
        descending = amg_window(opposite)
    tx, fallback = learned.apply(theta), sgd().apply({})
    return {
        "lgl2o": window(guards.lgl2o(tx, fallback, n_t=n_t, n_c=n_c), n_t),
        "race": window(guards.race(tx, fallback, n_t=n_t, n_c=n_c), n_t),
        "gl2o": window(guards.gl2o(tx, fallback), n_t),
        "smg": window(guards.smg(learned, theta, n_t=n_t, n_c=n_c), 2 * n_t + 1),
        "amg": descending,
    }


def _time(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds ``[repeats]`` of each call, after one call that compiles."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}
