"""Time of a guard's window over the sum of its parts, all measured in one run.

A window may cost less than the sum: its runs do not depend on one another, so that XLA computes
them side by side where threads are idle, which parts that are timed one after the other cannot
have. The same parts in one program, without any decision, tell both apart: what is above them is
the cost of the guard.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from metaopt import guards
from metaopt.core.rollouts import mean_loss, unroll, windowed
from metaopt.core.types import LearnedOptimizer, Task
from metaopt.datasets import Dataset, digits
from metaopt.optimizers import lstm
from metaopt.optimizers import sgd as make_sgd
from metaopt.tasks import classification
from metaopt.tasks.networks import CNN, MLP

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP-20": lambda: MLP((20, 10), nn.sigmoid),
    "CNN-3": lambda: CNN(10),
}
# What a window is made of: the name of a part (see `_parts`) and how often it occurs.
IDEALS: dict[str, dict[str, int]] = {
    "lgl2o": {"learned": 1, "fallback": 1, "losses": 2},
    "race": {"learned": 1, "fallback": 1, "losses": 2},
    "gl2o": {"learned": 1, "fallback": 1},
    "smg": {"meta_gradient": 1, "adapted": 2, "losses": 2},
    "amg": {"meta_gradient": 1, "adapted": 1, "losses": 4, "gradient": 1},
}


def images() -> Dataset:
    """The 8x8 digits enlarged to 28x28: real images without a download."""
    data = digits()

    def enlarge(x):
        x = jnp.repeat(jnp.repeat(x, 3, axis=1), 3, axis=2)  # [n, 24, 24, 1]
        return jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))

    splits: Any = {
        split: {"x": enlarge(examples["x"]), "y": examples["y"]}
        for split, examples in data.splits.items()
    }
    return data._replace(name="digits at 28x28", splits=splits)


def run(
    *,
    repeats: int = 7,
    n_t: int = 10,
    n_c: int = 10,
    batch_size: int = 128,
    networks: Sequence[str] = tuple(NETWORKS),
    hidden: int = 20,
) -> dict[str, Any]:
    """Measures a window of every guard and, interleaved with it, each of its parts alone.

    Args:
      repeats: rounds; a round times everything once. Ratios are formed inside of a round, so that
        a machine that slows down slows both sides, and the median over rounds is reported.
      n_t, n_c, batch_size: as in the papers.
      networks: names in `NETWORKS`.
      hidden: units of the LSTM optimizer.

    Returns:
      ``{"device", "threads", "n_t", "n_c", "batch_size", "data", "repeats", "rows"}``; a row has
      "network", "params", "guard", "window_ms", "ideal_ms" (sum of its parts), "ratio",
      "together_ms" (its parts in one program), "overhead" (over that) and "parts_ms".
    """
    rows, data = [], images()
    for network in networks:
        task = classification(NETWORKS[network](), data, batch_size=batch_size)
        rows += _network_rows(network, task, lstm(hidden), repeats, n_t, n_c)
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
    """A record of `run` for people."""
    table = Table(
        title=f"One window (n_t {record['n_t']}, n_c {record['n_c']}, batch {record['batch_size']}"
        f", {record['data']}) on {record['device']}, {record['threads']} threads"
    )
    for column in (
        "network",
        "parameters",
        "guard",
        "window ms",
        "sum of parts ms",
        "ratio",
        "over one program",
    ):
        table.add_column(column, justify="left" if column in ("network", "guard") else "right")
    for row in record["rows"]:
        numbers = (f"{row['window_ms']:.1f}", f"{row['ideal_ms']:.1f}", f"{row['ratio']:.2f}")
        numbers += (f"{row['overhead']:.2f}",)
        table.add_row(row["network"], f"{row['params']:,}", row["guard"], *numbers)
    return table


def _network_rows(
    network: str, task: Task, family: LearnedOptimizer, repeats: int, n_t: int, n_c: int
) -> list[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), 4)
    params = task.init(keys[0])
    theta = family.init(keys[1], params)
    batches = (task.sample(keys[2], (2 * n_t + 1,)), task.sample(keys[3], (n_c,)))
    parts = _parts(task, family, theta, params, batches, n_t)
    calls = {name: lambda f=f, args=args: f(*args) for name, (f, args) in parts.items()}
    calls |= {f"parts of {name}": _together(parts, ideal) for name, ideal in IDEALS.items()}
    windows = _windows(task, family, theta, params, batches, n_t, n_c)
    calls |= {f"window of {name}": call for name, call in windows.items()}
    rounds = _time(calls, repeats)

    rows = []
    for guard in windows:
        ideal = IDEALS[guard]
        window = rounds[f"window of {guard}"]
        together = rounds[f"parts of {guard}"]
        total = sum(count * rounds[part] for part, count in ideal.items())
        rows.append(
            {
                "network": network,
                "params": int(optax.tree.size(params)),
                "guard": guard,
                "window_ms": 1e3 * float(np.median(window)),
                "ideal_ms": 1e3 * float(np.median(total)),
                "ratio": float(np.median(window / total)),
                "together_ms": 1e3 * float(np.median(together)),
                "overhead": float(np.median(window / together)),
                "parts_ms": {p: 1e3 * float(np.median(rounds[p])) for p in ideal},
            }
        )
    return rows


def _parts(task, family, theta, params, batches, n_t) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What windows are made of, each compiled alone, with its arguments."""
    train, held_out = batches
    steps = jax.tree.map(lambda leaf: leaf[:n_t], train)
    one = jax.tree.map(lambda leaf: leaf[n_t], train)
    sgd = make_sgd().apply({})

    def walk(theta, params):
        tx = family.apply(theta)
        params, state, _ = unroll(tx, params, tx.init(params), task.loss, steps, second_order=False)
        return params, family.absorb(theta, state)

    def meta(pair):
        end = walk(*pair)
        return task.loss(end[0], one), end

    def run(tx):  # as inside a guard: the state comes from before and goes on
        walk = jax.jit(lambda params, state: unroll(tx, params, state, task.loss, steps)[:2])
        return walk, (params, tx.init(params))

    return {
        "learned": run(family.apply(theta)),
        "fallback": run(sgd),
        "adapted": (jax.jit(walk), (theta, params)),
        "losses": (jax.jit(lambda p: mean_loss(task.loss, p, held_out)), (params,)),
        "gradient": (jax.jit(lambda p: jax.value_and_grad(task.loss)(p, one)), (params,)),
        "meta_gradient": (
            jax.jit(jax.value_and_grad(meta, has_aux=True)),
            ((theta, params),),
        ),
    }


def _together(parts: dict[str, Any], ideal: dict[str, int]) -> Callable[[], Any]:
    """All parts of a window as one program."""
    names = [name for name, count in ideal.items() for _ in range(count)]
    # Arguments of their own: the compiler would merge two parts that are given the same ones.
    args = jax.tree.map(jnp.array, [parts[name][1] for name in names])
    program = jax.jit(lambda args: [parts[n][0](*a) for n, a in zip(names, args, strict=True)])
    return lambda: program(args)


def _windows(task, family, theta, params, batches, n_t, n_c) -> dict[str, Callable[[], Any]]:
    """One window of every guard."""
    train, held_out = batches
    learned, sgd = family.apply(theta), make_sgd().apply({})
    sizes = {"n_t": n_t, "n_c": n_c}

    def call(guard, count):
        steps = jax.tree.map(lambda leaf: leaf[:count], train)

        def window(params, state):
            updates, state = guard.update(
                None, state, params, loss_fn=task.loss, train_batches=steps, eval_batches=held_out
            )
            return optax.apply_updates(params, updates), state

        compiled, state = jax.jit(window), guard.init(params)
        return lambda: compiled(params, state)

    def amg(theta):
        return call(guards.amg(family, theta, **sizes), 2 * n_t + 1)

    # AMG back-propagates only where the learned steps lower the loss: of two untrained optimizers
    # that step in opposite directions, one does.
    net = theta["net"]
    opposite = {**theta, "net": {**net, "readout": optax.tree.scale(-1.0, net["readout"])}}
    descends = amg(theta)
    if descends()[1].used_gradient:
        descends = amg(opposite)
    return {
        "lgl2o": call(guards.lgl2o(learned, sgd, **sizes), n_t),
        "race": call(guards.race(learned, sgd, **sizes), n_t),
        "gl2o": call(windowed(guards.gl2o(learned, sgd)), n_t),
        "smg": call(guards.smg(family, theta, **sizes), 2 * n_t + 1),
        "amg": descends,
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
