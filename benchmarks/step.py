"""Time of one update of a learned optimizer, as a multiple of the time of one update of Adam.

Measured: a jitted ``update`` on the params of an MLP, its compile time, and the size of its state.
Reference: `optax.adam` on the same tree. A round times one update of Adam and one of the learned
optimizer; the ratio is the median of the ratios within rounds, so that a machine that slows down
slows both sides.

    python -m benchmarks step [--out FILE]     # about a minute on 2 cores
"""

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

from benchmarks import workload
from metaopt import optimizers
from metaopt.core.types import LearnedOptimizer, Params, Theta

LEARNED: dict[str, Callable[[], LearnedOptimizer]] = workload.LEARNED | {
    "celo": optimizers.celo,
    "celo_adam": optimizers.celo_adam,
    "celo2_base": lambda: optimizers.celo2(orthogonalize=False),
    "celo2": optimizers.celo2,
    "adafac_mlp": optimizers.adafac_mlp,
}
NUM_STEPS = 10_000  # the horizon that the optimizers are told; no run gets there


def run(
    *,
    sizes: Sequence[int] = (784, 1000, 300, 10),
    repeats: int = 20,
    names: Sequence[str] = tuple(LEARNED),
) -> dict[str, Any]:
    """Measures one update of each optimizer, interleaved with updates of `optax.adam`.

    The first row is Adam against itself. Every update gets its old state donated, and theta as an
    argument.

    Args:
      sizes: units of an MLP, inputs first; its weights and biases are the tree.
      repeats: rounds for each optimizer.
      names: keys of `LEARNED`.

    Returns:
      ``{"device", "threads", "sizes", "params", "repeats", "rows"}``; a row has "optimizer",
      "step_ms", "adam_ms", "ratio", "compile_s" and "state_bytes_per_param".

    Raises:
      ValueError: when a name is not a key of `LEARNED`.
    """
    unknown = sorted(set(names) - set(LEARNED))
    if unknown:
        raise ValueError(f"step: no optimizer {unknown}; there are {sorted(LEARNED)}.")
    params = _tree(sizes, seed=0)
    grads = _tree(sizes, seed=1)
    num_params = int(optax.tree.size(params))
    adam = _Update(lambda theta: optax.adam(1e-3), theta={}, grads=grads, params=params)
    rows = [_row("adam", adam, adam, repeats=repeats, num_params=num_params)]
    for name in names:
        lopt = LEARNED[name]()
        update = _Update(
            lambda theta, lopt=lopt: lopt.apply(theta, num_steps=NUM_STEPS),
            theta=lopt.init(jax.random.key(2), params),
            grads=grads,
            params=params,
        )
        rows.append(_row(name, update, adam, repeats=repeats, num_params=num_params))
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
    """Renders a record of `run`."""
    network = "-".join(map(str, record["sizes"]))
    table = Table(
        title=f"One update on an MLP {network} ({record['params']:,} parameters), "
        f"{record['device']}, {record['threads']} threads"
    )
    table.add_column("optimizer")
    for column in ("step ms", "adam ms", "ratio", "compile s", "state bytes/parameter"):
        table.add_column(column, justify="right")
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


def _tree(sizes: Sequence[int], *, seed: int) -> Params:
    """Random weights and biases of an MLP."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(sizes)))
    return {
        f"layer_{k}": {
            "w": jax.random.normal(next(keys), (n_in, n_out)) * n_in**-0.5,
            "b": 0.1 * jax.random.normal(next(keys), (n_out,)),
        }
        for k, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


class _Update:
    """A compiled update and its state; a call takes one step and returns its seconds.

    Attributes:
      compile_s: seconds of compilation.
      state_bytes: size of the state.
    """

    def __init__(
        self,
        apply: Callable[[Theta], optax.GradientTransformation],
        *,
        theta: Theta,
        grads: Params,
        params: Params,
    ):
        def step(state, theta, grads, params, value):
            tx = optax.with_extra_args_support(apply(theta))
            return tx.update(grads, state, params, value=value)

        # Some leaves of a new state may be leaves of theta; a donated leaf must be a copy.
        self._state = jax.tree.map(jnp.copy, apply(theta).init(params))
        self._args = (theta, grads, params, jnp.float32(1.0))
        lowered = jax.jit(step, donate_argnums=0).lower(self._state, *self._args)
        start = time.perf_counter()
        self._compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
        self()  # the first call is slower

    def __call__(self) -> float:
        start = time.perf_counter()
        updates, self._state = self._compiled(self._state, *self._args)
        jax.block_until_ready((updates, self._state))
        return time.perf_counter() - start


def _row(
    name: str, update: _Update, adam: _Update, *, repeats: int, num_params: int
) -> dict[str, Any]:
    """Times both updates in turn."""
    seconds = np.array([(adam(), update()) for _ in range(repeats)])
    adam_s, step_s = seconds[:, 0], seconds[:, 1]
    return {
        "optimizer": name,
        "step_ms": 1e3 * float(np.median(step_s)),
        "adam_ms": 1e3 * float(np.median(adam_s)),
        "ratio": float(np.median(step_s / adam_s)),
        "compile_s": update.compile_s,
        "state_bytes_per_param": update.state_bytes / num_params,
    }
