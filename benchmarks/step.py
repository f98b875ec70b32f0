"""Time of one update of a learned optimizer over one of Adam, on the same tree in the same run."""

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from metaopt import optimizers
from metaopt.core.types import LearnedOptimizer, Params

NUM_STEPS = 10_000  # the horizon that the optimizers are told; no run gets there
# What is measured: a name and its constructor, looked up when it is used.
LEARNED: dict[str, Callable[[], LearnedOptimizer]] = {
    "lstm": lambda: optimizers.lstm(20),
    "l3rs": lambda: optimizers.l3rs(("sgd", "adam")),
    "velo": lambda: optimizers.velo(512, 256),
}


def run(
    *,
    sizes: Sequence[int] = (784, 1000, 300, 10),
    repeats: int = 20,
    names: Sequence[str] = tuple(LEARNED),
) -> dict[str, Any]:
    """Measures jitted updates, each interleaved with updates of `optax.adam`.

    A round times one update of Adam and one of the learned optimizer. The ratio is the median of
    the ratios within rounds, so that a machine that slows down slows both sides. Adam's first row
    is Adam against itself. Every update gets its old state donated and theta as an argument.

    Args:
      sizes: units of an MLP, inputs first; its weights and biases are the tree.
      repeats: rounds for each optimizer.
      names: keys of `LEARNED`.

    Returns:
      ``{"device", "threads", "sizes", "params", "repeats", "rows"}``; a row has "optimizer",
      "step_ms", "adam_ms", "ratio", "compile_s" and "state_bytes_per_param".
    """
    unknown = sorted(set(names) - set(LEARNED))
    if unknown:
        raise ValueError(f"step: no optimizer {unknown}; there are {sorted(LEARNED)}.")
    params = _tree(sizes)
    grads = _tree(sizes, seed=1)
    baseline = _compiled(lambda theta: optax.adam(1e-3), {}, grads, params)
    num_params = int(optax.tree.size(params))
    rows = [_row("adam", baseline, baseline, repeats, num_params)]
    for name in names:
        family = LEARNED[name]()
        theta = family.init(jax.random.key(2), params)
        apply = lambda theta, family=family: family.apply(theta, num_steps=NUM_STEPS)
        stepper = _compiled(apply, theta, grads, params)
        rows.append(_row(name, stepper, baseline, repeats, num_params))
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "threads": os.cpu_count(),
        "sizes": list(sizes),
        "params": num_params,
        "repeats": repeats,
        "rows": rows,
    }


def table(record: dict[str, Any]) -> Table:
    """A record of `run` for people."""
    table = Table(
        title=f"One update on an MLP {'-'.join(map(str, record['sizes']))} "
        f"({record['params']:,} parameters), {record['device']}, {record['threads']} threads"
    )
    columns = ("optimizer", "step ms", "adam ms", "ratio", "compile s", "state bytes/parameter")
    for column in columns:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in record["rows"]:
        table.add_row(
            row["optimizer"],
            f"{row['step_ms']:.2f}",
            f"{row['adam_ms']:.2f}",
            f"{row['ratio']:.1f}",
            f"{row['compile_s']:.1f}",
            f"{row['state_bytes_per_param']:.1f}",
        )
    return table


def _tree(sizes: Sequence[int], seed: int = 0) -> Params:
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(sizes)))
    return {
        f"layer_{k}": {
            "w": jax.random.normal(next(keys), (n_in, n_out)) * n_in**-0.5,
            "b": 0.1 * jax.random.normal(next(keys), (n_out,)),
        }
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


class _Stepper:
    """A compiled update with its state; a call takes one step and returns its seconds."""

    def __init__(self, call: Callable[[Any], Any], state: Any, compile_s: float):
        self.call, self.state, self.compile_s = call, state, compile_s
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def __call__(self) -> float:
        start = time.perf_counter()
        updates, self.state = self.call(self.state)
        jax.block_until_ready((updates, self.state))
        return time.perf_counter() - start


def _compiled(apply, theta, grads, params) -> _Stepper:
    def step(state, theta, grads, params, value):
        tx = optax.with_extra_args_support(apply(theta))
        return tx.update(grads, state, params, value=value)

    rest = (theta, grads, params, jnp.float32(1.0))
    # Copies: some leaves of a new state may be leaves of theta, and a donated leaf is gone.
    state = jax.tree.map(jnp.copy, apply(theta).init(params))
    lowered = jax.jit(step, donate_argnums=0).lower(state, *rest)
    start = time.perf_counter()
    compiled = lowered.compile()
    stepper = _Stepper(lambda s: compiled(s, *rest), state, time.perf_counter() - start)
    stepper()
    return stepper


def _row(
    name: str, stepper: _Stepper, baseline: _Stepper, repeats: int, num_params: int
) -> dict[str, Any]:
    rounds = np.array([(baseline(), stepper()) for _ in range(repeats)])
    step, adam = rounds[:, 1], rounds[:, 0]
    return {
        "optimizer": name,
        "step_ms": 1e3 * float(np.median(step)),
        "adam_ms": 1e3 * float(np.median(adam)),
        "ratio": float(np.median(step / adam)),
        "compile_s": stepper.compile_s,
        "state_bytes_per_param": stepper.state_bytes / num_params,
    }
