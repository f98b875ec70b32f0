"""Time, compilation and memory of a guarded training step, over those of the step without a guard.

Measured: a jitted training step with `optax.adamw`, and the same step with
``race(challenger, optax.adamw)``, while both runners run and while the challenger is retired. A
round times everything, and ratios are formed within rounds. The compilation of the guarded step is
compared with the sum of the compilations of its two sides' steps. Networks use Flax's own layers;
that with batch norm carries its running statistics as model state.

    python -m benchmarks guards [--out FILE]     # some minutes on 2 cores
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

import metaopt
from benchmarks.workload import images
from metaopt import guards, optimizers
from metaopt.core.trees import nbytes
from metaopt.core.types import Batch, Params
from metaopt.tasks import catalog

ALWAYS = 10**6  # windows: longer than any run here


class ConvNet(nn.Module):
    """Three convolutions of stride 2 and a read-out."""

    @nn.compact
    def __call__(self, x):
        for channels in (16, 32, 64):
            x = nn.relu(nn.Conv(channels, (3, 3), strides=(2, 2))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class BatchNormResNet(nn.Module):
    """A stem and three stages of two residual blocks, with batch norm."""

    @nn.compact
    def __call__(self, x):
        def conv(x, channels, stride=1):
            x = nn.Conv(channels, (3, 3), strides=(stride, stride), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=False)(x)

        x = nn.relu(conv(x, 8, 2))
        for channels, stride in ((8, 1), (8, 1), (16, 2), (16, 1), (32, 2), (32, 1)):
            y = conv(nn.relu(conv(x, channels, stride)), channels)
            if y.shape != x.shape:
                x = conv(x, channels, stride)
            x = nn.relu(x + y)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class Dense(nn.Module):
    """Two layers of 128 units and a read-out."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


class Problem(NamedTuple):
    """What is trained.

    Attributes:
      params: initial params.
      model_state: initial running statistics, or None.
      batch: a mini-batch.
      loss: ``(params, model_state, batch) -> (loss, model_state)``.
    """

    params: Params
    model_state: Any
    batch: Batch
    loss: Callable[[Params, Any, Batch], tuple[jax.Array, Any]]


def image_problem(net: nn.Module, batch_size: int) -> Problem:
    """Classification of digits at 28x28."""
    examples = images().splits["train"]
    x = jnp.asarray(examples["x"][:batch_size], jnp.float32) / 16
    y = jnp.asarray(examples["y"][:batch_size])
    variables = jax.jit(net.init)(jax.random.key(0), x)
    statistics = variables.get("batch_stats")

    def loss(params, model_state, batch):
        logits: Any
        given: Any = {"params": params}
        if model_state is None:
            logits, new_state = net.apply(given, batch["x"]), None
        else:
            given["batch_stats"] = model_state
            logits, changed = net.apply(given, batch["x"], mutable=["batch_stats"])
            new_state = changed["batch_stats"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(losses), new_state

    return Problem(variables["params"], statistics, {"x": x, "y": y}, loss)


def text_problem() -> Problem:
    """A small transformer on text."""
    task: Any = catalog.build("python-text")
    batch = task.sample(jax.random.key(1), ())
    loss = lambda params, model_state, batch: (task.loss(params, batch), model_state)
    return Problem(task.init(jax.random.key(0)), None, batch, loss)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "dense": lambda batch_size: image_problem(Dense(), batch_size),
    "conv": lambda batch_size: image_problem(ConvNet(), batch_size),
    "resnet": lambda batch_size: image_problem(BatchNormResNet(), batch_size),
    "transformer": lambda batch_size: text_problem(),
}


def _l3rs(params: Params) -> Any:
    optimizer = optimizers.l3rs(variant="none")
    return optimizer.apply(optimizer.init(jax.random.key(2), params), num_steps=1000)


def _velo(params: Params) -> Any:
    del params
    export = metaopt.load("velo-small")
    return export.optimizer.apply(export.theta, num_steps=1000)


CHALLENGERS: dict[str, Callable[[Params], Any]] = {
    "AdamW": lambda params: optax.adamw(2e-3),
    "L3RS": _l3rs,
    "VeLO": _velo,
}
# (problem, challenger)
PAIRS = (
    ("dense", "AdamW"),
    ("conv", "AdamW"),
    ("resnet", "AdamW"),
    ("resnet", "L3RS"),
    ("resnet", "VeLO"),
    ("transformer", "AdamW"),
)


class Step(NamedTuple):
    """A compiled training step with the arguments of its next call.

    Attributes:
      compiled: ``(params, state, model_state) -> (params, state, model_state)``.
      carry: its arguments.
      compile_seconds: computing time of its compilation.
      temporaries: bytes of its temporary buffers.
    """

    compiled: Callable[..., Any]
    carry: Any
    compile_seconds: float
    temporaries: int

    def run(self, number: int) -> tuple["Step", float]:
        """Takes a number of steps; returns the seconds of one."""
        carry, started = self.carry, time.perf_counter()
        for _ in range(number):
            carry = self.compiled(*carry)
        jax.block_until_ready(carry)
        return self._replace(carry=carry), (time.perf_counter() - started) / number


def compiled_step(step: Callable[..., Any], *carry: Any) -> Step:
    """Compiles a step, with donated arguments as in large training loops."""
    carry = jax.tree.map(jnp.array, carry)
    started = time.process_time()
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*carry).compile()
    seconds = time.process_time() - started
    used: Any = compiled.memory_analysis()
    return Step(compiled, carry, seconds, used.temp_size_in_bytes)


def plain_step(problem: Problem, tx: Any) -> Step:
    """The step that users write without a guard."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, model_state):
        (value, model_state), grads = jax.value_and_grad(problem.loss, has_aux=True)(
            params, model_state, problem.batch
        )
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, model_state

    return compiled_step(step, problem.params, tx.init(problem.params), problem.model_state)


def guarded_step(problem: Problem, tx: Any) -> Step:
    """The step that users write with a guard."""

    def value_fn(params, *model_state):
        given = model_state[0] if model_state else None
        loss, new_state = problem.loss(params, given, problem.batch)
        return (loss, new_state) if model_state else loss

    def step(params, state, model_state):
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state, model_state

    state = tx.init(problem.params, problem.model_state)
    return compiled_step(step, problem.params, state, None)


def run(
    *,
    repeats: int = 9,
    steps: int = 10,
    batch_size: int = 128,
    pairs: Sequence[tuple[str, str]] = PAIRS,
) -> dict[str, Any]:
    """Measures guarded steps.

    Args:
      repeats: rounds; a round times everything once.
      steps: steps that are timed together.
      batch_size: images of a mini-batch.
      pairs: names in `PROBLEMS` and in `CHALLENGERS`.

    Returns:
      ``{"device", "threads", "batch_size", "repeats", "rows"}``; a row has "network",
      "challenger", "tensors", "params", "step_ms" (without a guard), "running" and "retired"
      (guarded over unguarded time), "parts" (guarded time over that of both sides' steps),
      "compile" (over both sides' compilations), "state" (its bytes over those of both runners'
      params and states) and "temporaries" (over those of the step without a guard).
    """
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "threads": os.cpu_count(),
        "batch_size": batch_size,
        "repeats": repeats,
        "rows": [_row(*pair, repeats, steps, batch_size) for pair in pairs],
    }


def _row(network: str, name: str, repeats: int, steps: int, batch_size: int) -> dict[str, Any]:
    problem = PROBLEMS[network](batch_size)
    fallback, challenger = optax.adamw(1e-3), CHALLENGERS[name](problem.params)
    running = guards.race(challenger, fallback, patience=ALWAYS, budget=1)
    retired = guards.race(optax.scale(1.0), fallback, n_t=1, patience=1, trial=1, budget=0)
    contenders = {
        "plain": plain_step(problem, fallback),
        "side": plain_step(problem, challenger),
        "running": guarded_step(problem, running),
        "retired": guarded_step(problem, retired),
    }
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(-1, repeats):
        for contender, step in contenders.items():
            contenders[contender], taken = step.run(steps)
            if repeat >= 0:  # the first round warms up, and retires the challenger
                seconds[contender].append(taken)
    times = {contender: np.array(taken) for contender, taken in seconds.items()}
    ratio = lambda a, b: float(np.median(times[a] / b))
    compilation = {contender: step.compile_seconds for contender, step in contenders.items()}
    one = (problem.params, problem.model_state)
    runners = [
        *(one, one),
        *(jax.eval_shape(tx.init, problem.params) for tx in (challenger, fallback)),
    ]
    return {
        "network": network,
        "challenger": name,
        "tensors": len(jax.tree.leaves(problem.params)),
        "params": int(optax.tree.size(problem.params)),
        "step_ms": 1e3 * float(np.median(times["plain"])),
        "running": ratio("running", times["plain"]),
        "retired": ratio("retired", times["plain"]),
        "parts": ratio("running", times["plain"] + times["side"]),
        "compile_s": compilation["running"],
        "compile": compilation["running"] / (compilation["plain"] + compilation["side"]),
        "state": nbytes(contenders["running"].carry[1]) / nbytes(runners),
        "temporaries": contenders["running"].temporaries / contenders["plain"].temporaries,
    }


def table(record: dict[str, Any]) -> Table:
    """Renders a record of `run`."""
    table = Table(
        title=f"race(challenger, AdamW), batch {record['batch_size']}, on {record['device']}, "
        f"{record['threads']} threads",
        caption="both run, retired: time over that of the step without a guard; compile: over both "
        "sides' compilations; state: over both runners' params and states; temporaries: over those "
        "of the step without a guard",
    )
    table.add_column("network, challenger", no_wrap=True)
    for column in ("step ms", "both run", "retired", "compile", "state", "temporaries"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        table.add_row(
            f"{row['network']}, {row['challenger']}",
            f"{row['step_ms']:.1f}",
            f"{row['running']:.2f}",
            f"{row['retired']:.2f}",
            f"{row['compile']:.2f}",
            f"{row['state']:.2f}",
            f"{row['temporaries']:.2f}",
        )
    return table
