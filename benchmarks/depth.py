"""Cost of many tensors: tracing, compilation and time of updates on the shapes of a ResNet-34.

Measured: a jitted training step, a gradient of a plain loss and one update, on the params of a
ResNet-34 (36 kernels, a scale and a shift for each, one dense layer: 110 tensors, 21.8 million
numbers). The loss is a sum of squares, so that its gradient costs next to nothing. Tracing and
compilation are in seconds of the processor, which another process does not change by much. The time
of a step is a multiple of that of a step with `optax.adam`, the median over rounds of both.

A guard's "parts" is its compilation over the sum of those of its two sides.

    python -m benchmarks depth [--out FILE]     # some minutes on 2 cores
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from metaopt import guards, optimizers
from metaopt.core.types import LearnedOptimizer, Params

LEARNED: dict[str, Callable[[], LearnedOptimizer]] = {
    "l3rs": lambda: optimizers.l3rs(("sgd", "adam"), variant="none"),
    "celo_adam": lambda: optimizers.celo_adam(warn_past_horizon=False),
    "celo": lambda: optimizers.celo(warn_past_horizon=False),
    "velo": lambda: optimizers.velo(512, 256, warn_past_horizon=False),
}
GUARDED = ("adam", "l3rs", "velo")  # challengers of `race` with AdamW as its fallback
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # channels and blocks of two convolutions


def run(
    *,
    stages: Sequence[tuple[int, int]] = STAGES,
    repeats: int = 5,
    learned: Sequence[str] = tuple(LEARNED),
    guarded: Sequence[str] = GUARDED,
) -> dict[str, Any]:
    """Measures a training step with each optimizer.

    Args:
      stages: channels and number of blocks of each stage of the residual network.
      repeats: rounds of timed steps for each optimizer.
      learned: keys of `LEARNED`.
      guarded: challengers: "adam" or some of `learned`.

    Returns:
      ``{"device", "threads", "tensors", "params", "repeats", "rows"}``; a row has "optimizer",
      "trace_cpu_s", "compile_cpu_s", "ratio" of the time of a step to Adam's, and of a guard
      "parts".
    """
    params = residual_params(stages)
    adam = _Step(optax.adam(1e-3), params)
    adamw = _Step(optax.adamw(1e-3), params)
    rows = [_row("adam", adam, adam, repeats), _row("adamw", adamw, adam, repeats)]
    sides = {"adam": (optax.adam(1e-3), adam.cpu_s)}
    for name in learned:
        lopt = LEARNED[name]()
        theta = jax.jit(lopt.init)(jax.random.key(0), params)
        tx = lopt.apply(theta, num_steps=10_000)
        step = _Step(tx, params)
        sides[name] = (tx, step.cpu_s)
        rows.append(_row(name, step, adam, repeats))
    for name in guarded:
        tx, cpu_s = sides[name]
        step = _Step(guards.race(tx, optax.adamw(1e-3)), params)
        row = _row(f"race({name}, adamw)", step, adam, repeats)
        rows.append({**row, "parts": step.cpu_s / (cpu_s + adamw.cpu_s)})
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "threads": os.cpu_count(),
        "tensors": len(jax.tree.leaves(params)),
        "params": int(optax.tree.size(params)),
        "repeats": repeats,
        "rows": rows,
    }


def residual_params(stages: Sequence[tuple[int, int]]) -> Params:
    """Constants of the shapes of a residual network for 1000 classes."""

    def layer(size: int, inputs: int, outputs: int) -> Params:
        return {
            "kernel": jnp.full((size, size, inputs, outputs), 0.5),
            "scale": jnp.ones(outputs),
            "shift": jnp.zeros(outputs),
        }

    params, inputs = {"stem": layer(7, 3, stages[0][0])}, stages[0][0]
    for stage, (channels, blocks) in enumerate(stages):
        for block in range(blocks):
            name = f"stage{stage}_block{block}"
            params[f"{name}_0"] = layer(3, inputs, channels)
            params[f"{name}_1"] = layer(3, channels, channels)
            if inputs != channels:
                params[f"{name}_skip"] = layer(1, inputs, channels)
            inputs = channels
    params["dense"] = {"kernel": jnp.full((inputs, 1000), 0.5), "bias": jnp.zeros(1000)}
    return params


def table(record: dict[str, Any]) -> Table:
    """Renders a record of `run`."""
    table = Table(
        title=f"A step on {record['tensors']} tensors ({record['params']:,} parameters), "
        f"{record['device']}, {record['threads']} threads"
    )
    table.add_column("optimizer")
    for column in ("trace CPU s", "compile CPU s", "over its parts", "step over adam's"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        table.add_row(
            row["optimizer"],
            f"{row['trace_cpu_s']:.1f}",
            f"{row['compile_cpu_s']:.1f}",
            f"{row['parts']:.2f}" if "parts" in row else "",
            f"{row['ratio']:.1f}",
        )
    return table


class _Step:
    """A compiled training step and its state; a call takes one step and returns its seconds.

    Attributes:
      trace_s: seconds of the processor for tracing and lowering.
      compile_s: seconds of the processor for compilation.
    """

    def __init__(self, tx: Any, params: Params):
        loss_fn = lambda params: sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params))

        def step(state, params):
            if isinstance(tx, guards.Guard):
                updates, state = tx.update(None, state, params, value_fn=loss_fn)
            else:
                value, grads = jax.value_and_grad(loss_fn)(params)
                updates, state = optax.with_extra_args_support(tx).update(
                    grads, state, params, value=value
                )
            return state, optax.apply_updates(params, updates)

        # A leaf of a new state may be a leaf of theta; donated leaves must be copies.
        copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        self._carried = copied((jax.jit(tx.init)(params), params))
        start = time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carried)
        traced = time.process_time()
        self._compiled = lowered.compile()
        self.trace_s, self.compile_s = traced - start, time.process_time() - traced
        self()  # the first call is slower

    @property
    def cpu_s(self) -> float:
        return self.trace_s + self.compile_s

    def __call__(self) -> float:
        start = time.perf_counter()
        self._carried = jax.block_until_ready(self._compiled(*self._carried))
        return time.perf_counter() - start


def _row(name: str, step: _Step, adam: _Step, repeats: int) -> dict[str, Any]:
    """Times both steps in turn."""
    ratios = [step() / adam() for _ in range(repeats)]
    return {
        "optimizer": name,
        "trace_cpu_s": step.trace_s,
        "compile_cpu_s": step.compile_s,
        "ratio": float(np.median(ratios)),
    }
