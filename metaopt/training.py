"""Runs a meta-training to its end: checkpoints, resuming, keep-best, metrics and progress."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from metaopt.base import Key, Theta
from metaopt.files import write_whole
from metaopt.meta.base import MetaTrainer

METRICS, CONFIG, STATES, LOCK = "metrics.jsonl", "config.json", "states", "lock"


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes: trainer: state of the `MetaTrainer`; best, best_loss: the theta with the lowest
    validation loss so far.
    """

    trainer: Any
    best: Theta
    best_loss: jax.Array


def train(
    trainer: MetaTrainer,
    theta: Theta,
    *,
    steps: int,
    seed: int,
    out: str | os.PathLike[str],
    config: Mapping[str, Any],
    validate: Callable[[Theta, Key], jax.Array],
    validate_every: int = 25,
    checkpoint_every: int = 25,
    label: str = "meta-training",
    overwrite: bool = False,
) -> tuple[Theta, float]:
    """Meta-trains for `steps` steps, or what is left of them in the run folder `out`.

    Args:
      trainer: the method; its `step` is jitted here.
      theta: initial meta-parameters.
      steps: meta-updates of the whole run.
      seed: fixes all randomness; step i uses ``fold_in(key(seed), i)``, so that a resumed run
        continues exactly the same one.
      out: folder of the run: ``config.json``, ``metrics.jsonl``, ``states/`` (orbax).
      config: plain JSON data that a resumed run must share.
      validate: ``(theta, key) -> loss`` on held-out runs; the same key at every call.
      validate_every, checkpoint_every: in steps.
      label: shown by the progress bar.
      overwrite: start afresh where `out` holds a run.

    Returns:
      The theta with the lowest validation loss, and that loss.

    Raises: ValueError: steps < 1, or `out` holds a run with another configuration.
    """
    if steps < 1:
        raise ValueError(f"train: steps must be at least 1, got {steps}.")
    folder = Path(out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_writer(folder))
        _claim(folder, config, overwrite)
        k_init, k_validate, k_steps = jax.random.split(jax.random.key(seed), 3)
        step_fn, validate_fn = jax.jit(trainer.step), jax.jit(validate)
        initial = TrainState(trainer.init(k_init, theta), theta, jnp.zeros([]))
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        manager = stack.enter_context(ocp.CheckpointManager(folder / STATES, options=options))
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(initial))  # type: ignore
            done = latest
        else:  # the initial theta competes too: no run exports anything worse than its start
            state = initial._replace(best_loss=validate_fn(theta, k_validate))
            done = 0
        with _metrics_file(folder / METRICS, done) as metrics, _progress(label, steps) as report:
            for step in range(done, steps):
                started = time.perf_counter()
                inner, values = step_fn(jax.random.fold_in(k_steps, step), state.trainer)
                record = {name: np.asarray(value).item() for name, value in values.items()}
                record = {"step": step, **record, "seconds": time.perf_counter() - started}
                state = state._replace(trainer=inner)
                if (step + 1) % validate_every == 0 or step + 1 == steps:
                    current = trainer.theta(inner)
                    loss = validate_fn(current, k_validate)
                    better = loss < state.best_loss
                    state = TrainState(
                        inner,
                        optax.tree.where(better, current, state.best),
                        jnp.where(better, loss, state.best_loss),
                    )
                    record["validation_loss"] = float(loss)
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                report(step + 1, record)
                if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
                    manager.save(step + 1, args=ocp.args.StandardSave(state))  # type: ignore
    return state.best, float(state.best_loss)


@contextlib.contextmanager
def _only_writer(folder: Path):
    """Holds the run folder's lock; it is released when the process ends, however it ends."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder}: another process is training in this folder; wait for it, stop it, or "
                "choose another folder."
            ) from None
        yield


def _claim(folder: Path, config: Mapping[str, Any], overwrite: bool) -> None:
    """Makes the run folder, or checks that the run in it has the same configuration."""
    text = json.dumps(dict(config), indent=1, sort_keys=True)
    path = folder / CONFIG
    if path.exists() and not overwrite:
        old = json.loads(path.read_text())
        new = json.loads(text)
        if changed := sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k)):
            told = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
            raise ValueError(
                f"{folder} holds a run with another configuration ({told}). Resume with the old "
                "one, choose another folder, or start afresh with --overwrite."
            )
        return
    for old in folder.iterdir() if overwrite else ():
        if old.name != LOCK:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_whole(path, text.encode())


def _metrics_file(path: Path, done: int):
    """Opens the metrics for appending, without lines of steps that will be taken again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] < done:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # the last line of a killed run
        write_whole(path, "".join(kept).encode())
    return open(path, "a")


class _progress:
    """A progress bar on a terminal, and nothing elsewhere, nor in a worker process."""

    def __init__(self, label: str, steps: int):
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("meta-loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} inner steps/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not sys.stderr.isatty() or parent_process() is not None,
        )
        self.task = self.bar.add_task(label, total=steps, loss=float("nan"), rate=0.0)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *exc):
        self.bar.stop()

    def __call__(self, done: int, record: Mapping[str, Any]):
        rate = record["inner_steps"] / max(record["seconds"], 1e-9)
        self.bar.update(self.task, completed=done, loss=record["meta_loss"], rate=rate)


def read_metrics(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The metrics of a run as one array per name, NaN where a step has none."""
    lines = (Path(folder) / METRICS).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = {name for record in records for name in record}
    return {n: np.array([r.get(n, np.nan) for r in records], np.float64) for n in sorted(names)}
