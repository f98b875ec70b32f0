"""Measures two ways to write a convolution, alone and inside of loops and vmaps, on CPU.

Claim: XLA's own convolution leaves its fast path inside of a loop, and where every member of a vmap
has its own kernels. A convolution written as shifted slices and a matrix product does not.

    python -m experiments.convolution_forms [--out FILE]

Needs no data. Takes some minutes on 2 cores. Times gradients of the loss of LGL2O's CNN-3 on 28x28
images. Writes docs/results/bench-convolutions.json: milliseconds per gradient of each form in each
program, and the load of the machine; docs/scaling.md quotes it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from metaopt.evaluation.records import write_json
from metaopt.tasks.networks import Conv

RESULT = Path("docs/results/bench-convolutions.json")
Form = Literal["xla", "slices"]
FORMS: tuple[Form, ...] = ("xla", "slices")


class CNN3(nn.Module):
    """LGL2O's CNN-3.

    Attributes:
      form: form of its convolutions.
    """

    form: Form

    @nn.compact
    def __call__(self, x):
        for channels, kernel in ((8, 5), (16, 3), (32, 3)):
            x = nn.relu(Conv(channels, kernel, 2, form=self.form)(x))
        return nn.Dense(10)(x.reshape((x.shape[0], -1)))


class Program(NamedTuple):
    """A program that is timed.

    Attributes:
      fn: ``(params, images) -> params``; every gradient in it depends on the one before.
      params: of one network, or of several with a leading axis.
      images: ``[batch, 28, 28, 1]``.
      num_gradients: gradients that a call computes.
    """

    fn: Callable[[Any, jax.Array], Any]
    params: Any
    images: jax.Array
    num_gradients: int


def programs(form: Form, *, batch: int, members: int, steps: int) -> dict[str, Program]:
    """The programs, by name.

    Args:
      form: form of the convolutions.
      batch: images of a mini-batch.
      members: networks of a `vmap`.
      steps: gradient steps of a loop.
    """
    k_data, k_init = jax.random.split(jax.random.key(0))
    images = jax.random.normal(k_data, (batch, 28, 28, 1))
    labels = jnp.arange(batch) % 10
    net = CNN3(form)
    params: Any = jax.vmap(lambda key: net.init(key, images))(jax.random.split(k_init, members))
    first = jax.tree.map(lambda x: x[0], params)

    def gradient(params, images):
        def loss(params):
            logits: Any = net.apply(params, images)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return jax.grad(loss)(params)

    def loop(gradient):
        """Gradient steps in a scan, each from where the one before ended."""

        def fn(params, images):
            def step(params, _):
                return optax.tree.add_scale(params, -1e-3, gradient(params, images)), None

            return jax.lax.scan(step, params, length=steps)[0]

        return fn

    def map_of_loops(params, images):
        return jax.lax.map(lambda own: loop(gradient)(own, images), params)

    side_by_side = loop(jax.vmap(gradient, in_axes=(0, None)))
    return {
        "alone": Program(gradient, first, images, num_gradients=1),
        "in a scan": Program(loop(gradient), first, images, num_gradients=steps),
        f"scan of vmap of {members}": Program(
            side_by_side, params, images, num_gradients=steps * members
        ),
        f"map of {members} scans": Program(
            map_of_loops, params, images, num_gradients=steps * members
        ),
    }


def milliseconds(program: Program, repeats: int) -> float:
    """Time of one call, the median of `repeats` calls; the first one is left out."""
    args = (program.params, program.images)
    compiled = jax.jit(program.fn).lower(*args).compile()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def run(*, batch: int = 128, members: int = 16, steps: int = 5, repeats: int = 5) -> dict[str, Any]:
    """Times every form of every program and returns the record."""
    rows: dict[str, dict[str, float]] = {}
    for form in FORMS:
        for name, program in programs(form, batch=batch, members=members, steps=steps).items():
            ms = milliseconds(program, repeats) / program.num_gradients
            rows.setdefault(name, {})[form] = ms
            print(f"{name:24} {form:8} {ms:8.2f} ms per gradient", flush=True)
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "threads": os.cpu_count(),
        "load": os.getloadavg()[0],
        "batch": batch,
        "ms_per_gradient": rows,
    }


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description="Times two forms of a convolution.")
    parser.add_argument("--out", type=Path, default=RESULT, help="where to write the record")
    write_json(parser.parse_args().out, run())


if __name__ == "__main__":
    main()
