"""Child processes for tests, and a small meta-training that they run.

Children are forked from a server process that has the library imported, so that they start quickly.
The meta-training is NES on quadratics. Its optimizer learns one step size per coordinate, so that
tracing and compilation take little time.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import meta, tasks
from metaopt.core.types import LearnedOptimizer, single, transformation
from metaopt.meta import devices, loop

DIM = 6
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["metaopt.meta.loop", "metaopt.meta", "metaopt.tasks", "optax"])


def step_sizes() -> LearnedOptimizer:
    """SGD; theta are the logarithms of its step sizes, one per coordinate."""

    def apply(theta, *, num_steps=None):
        del num_steps
        step = lambda g, state, params=None, **extra: (-jnp.exp(theta["log_lr"]) * g, state)
        return transformation(optax.init_empty_state, step)

    return LearnedOptimizer(lambda key, params: {"log_lr": jnp.full(DIM, -3.0)}, apply)


def small_nes(spread=None, population=8, tasks_per_generation=4):
    """(trainer, theta, validate)."""
    lopt, family = step_sizes(), single(tasks.quadratic(DIM))
    theta = lopt.init(jax.random.key(0), jnp.zeros(DIM))
    config = meta.NESConfig(
        population=population, tasks=tasks_per_generation, min_steps=3, max_steps=6
    )
    spread = spread or devices.Spread()
    trainer = meta.nes(lopt, family, config, spread)
    return trainer, theta, lambda theta, key: jnp.sum((theta["log_lr"] + 1.0) ** 2)


def small_windows(method: str, mesh=None, chunk: int = 0):
    """(trainer, theta, validate) of the same optimizer by "pes" (8 pairs) or "tbptt" (8 tasks)."""
    _, theta, validate = small_nes()
    lopt, family = step_sizes(), single(tasks.quadratic(DIM))
    lengths = {"rollout": 6, "truncation": 2}
    if method == "pes":
        config = meta.PESConfig(population=16, tasks=2, lr=0.1, **lengths)
        return meta.pes(lopt, family, config, devices.Spread(mesh, chunk)), theta, validate
    config = meta.TBPTTConfig(tasks=8, lr=0.1, **lengths)
    return meta.tbptt(lopt, family, config, devices.Spread(mesh, chunk)), theta, validate


def train_small(out: Path, steps: int, *, spread=None, method="nes", **settings):
    """Trains it in folder `out`; returns the best theta and its validation loss."""
    mesh = spread.mesh if spread else None
    trainer, theta, validate = small_nes(spread) if method == "nes" else small_windows(method, mesh)
    given = {"config": {"a": 1}, "validate_every": 3, "checkpoint_every": 3, **settings}
    return loop.train(
        trainer, theta, steps=steps, seed=0, out=out, validate=validate, mesh=mesh, **given
    )


def prepare(cache: Path | None, num_devices: int = 1) -> None:
    """Configures JAX in a child; must be called before it computes anything."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    jax.config.update("jax_num_cpu_devices", num_devices)
    if cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def all_devices(chunk: int = 0) -> devices.Spread:
    return devices.Spread(devices.mesh_for(8, 4), chunk)


def run_small(out: Path, steps: int, cache: Path, num_devices: int = 1, **settings):
    """The main function of a child: `train_small` on all its devices; writes ``best.npy``."""
    prepare(cache, num_devices)
    best, _ = train_small(out, steps, spread=all_devices() if num_devices > 1 else None, **settings)
    np.save(out / "best.npy", log_lr(best))


def run_host(
    out: Path, steps: int, cache: Path, port: int, count: int, index: int, method: str = "nes"
):
    """The main function of a child that is one of `count` processes of one training."""
    prepare(cache)
    devices.initialise(f"localhost:{port}", count, index)
    best, _ = train_small(out, steps, spread=all_devices(), method=method)
    if index == 0:
        np.save(out / "best.npy", log_lr(best))
    out.with_name(f"{out.name}.process-{index}").write_text(f"{len(jax.devices())} devices")
    # JAX does this at the exit of the interpreter, which children of `multiprocessing` skip. If
    # process 0 ended before the others, they would be terminated.
    jax.distributed.shutdown()


def quietly(target, error_file: Path, *args, **kwargs):
    """Calls `target` with its stderr redirected to a file."""
    descriptor = os.open(error_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stderr.fileno())
    target(*args, **kwargs)


def start(target, *args, **kwargs):
    """Starts a child that runs ``target(*args, **kwargs)``."""
    child = CONTEXT.Process(target=target, args=args, kwargs=kwargs)
    child.start()
    return child


def finish(*children, timeout: float = 300.0) -> list[int | None]:
    """Waits for children; returns their exit codes."""
    for child in children:
        child.join(timeout)
    return [child.exitcode for child in children]


def final_checksum(out: Path) -> tuple[int, str]:
    """(step, SHA-256 of the whole state) of the newest checkpoint, as it records them."""
    newest = max(int(p.name) for p in (out / loop.STATES).iterdir() if p.name.isdigit())
    facts = json.loads((out / loop.STATES / str(newest) / "facts" / "metadata").read_text())
    return newest, facts["sha256"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def log_lr(theta) -> np.ndarray:
    return np.asarray(theta["log_lr"])
