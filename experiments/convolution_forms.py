"""Two ways to write a convolution, alone and in the loops and vmaps that meta-training is made of.

Claim: on CPU XLA's own convolution leaves its fast path inside of a loop and where every member of
a vmap has kernels of its own; written as shifted slices and a matrix product it does not.

    python -m experiments.convolution_forms      # writes docs/results/bench-convolutions.json

The network is CNN-3 of LGL2O on 28x28 images; what is timed are gradients of its loss.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from metaopt.tasks.networks import Conv

RESULT = Path("docs/results/bench-convolutions.json")
Form = Literal["xla", "slices"]


class CNN3(nn.Module):
    """Attributes: form: of its convolutions."""

    form: Form

    @nn.compact
    def __call__(self, x):
        for channels, kernel in ((8, 5), (16, 3), (32, 3)):
            x = nn.relu(Conv(channels, kernel, 2, form=self.form)(x))
        return nn.Dense(10)(x.reshape((x.shape[0], -1)))


def programs(form: Form, batch: int, members: int, steps: int):
    """name -> (function of no arguments that depends on them, gradients that it computes)."""
    k_data, k_init = jax.random.split(jax.random.key(0))
    images = jax.random.normal(k_data, (batch, 28, 28, 1))
    labels = jnp.arange(batch) % 10
    net = CNN3(form)
    params: Any = jax.vmap(lambda key: net.init(key, images))(jax.random.split(k_init, members))
    one = jax.tree.map(lambda x: x[0], params)

    def gradient(params, images):
        def loss(params):
            logits: Any = net.apply(params, images)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return jax.grad(loss)(params)

    def loop(step: Callable[[Any], Any]):
        """`steps` gradient steps, so that no iteration can be left out."""
        move = lambda params, _: (optax.tree.add_scale(params, -1e-3, step(params)), None)
        return lambda params, images: jax.lax.scan(move, params, length=steps)[0]

    def looped(params, images):
        return loop(lambda p: gradient(p, images))(params, images)

    def side_by_side(params, images):
        return loop(lambda p: jax.vmap(gradient, in_axes=(0, None))(p, images))(params, images)

    def mapped(params, images):
        return jax.lax.map(lambda p: looped(p, images), params)

    return {
        "alone": (gradient, one, images, 1),
        "in a scan": (looped, one, images, steps),
        f"scan of vmap of {members}": (side_by_side, params, images, steps * members),
        f"map of {members} scans": (mapped, params, images, steps * members),
    }


def milliseconds(fn: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Of one call; the median."""
    compiled = jax.jit(fn).lower(*args).compile()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def run(*, batch: int = 128, members: int = 16, steps: int = 5, repeats: int = 5) -> dict[str, Any]:
    """ms per gradient of every form and program, with the load of the machine meanwhile."""
    rows: dict[str, dict[str, float]] = {}
    forms: tuple[Form, ...] = ("xla", "slices")
    for form in forms:
        for name, (fn, params, images, count) in programs(form, batch, members, steps).items():
            ms = milliseconds(fn, params, images, repeats=repeats) / count
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
    parser = argparse.ArgumentParser(description="Time of two forms of a convolution")
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(run(), indent=1) + "\n")


if __name__ == "__main__":
    main()
