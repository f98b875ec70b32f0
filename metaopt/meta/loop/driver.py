"""The loop over meta-updates, from whatever an earlier part of the run left to its end."""

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jax.tree_util import Partial

from metaopt.core import cpu, memory
from metaopt.core.types import Key, Theta
from metaopt.meta import devices
from metaopt.meta.base import MetaTrainer
from metaopt.meta.loop import folder as run_folder
from metaopt.meta.loop import states
from metaopt.meta.loop.logs import log
from metaopt.meta.loop.states import RunState, Saved
from metaopt.meta.loop.stopping import Signals, Terminated, sigterm_noted
from metaopt.meta.updates import strong


class _Plan(NamedTuple):
    """The end of a run, and the intervals of its events.

    Attributes:
      steps: largest number of meta-updates.
      seconds: longest time; 0: no bound.
      validate_every: meta-updates between two validations.
      checkpoint_every: meta-updates between two checkpoints.
    """

    steps: int
    seconds: float
    validate_every: int
    checkpoint_every: int


class _Programs(NamedTuple):
    """The run's compiled functions. They take numpy arrays, or results of each other.

    Attributes:
      first: ``() -> RunState`` before the first step.
      step: ``(step, trainer state) -> (trainer state, metrics)``.
      validate: ``RunState -> (RunState, loss)``; updates the best theta.
      layout: `jax.ShapeDtypeStruct`s of a `RunState`, with shardings.
      memory: ``trainer state -> bytes`` that `step` needs on each device, or None if unknown.
    """

    first: Callable[..., RunState]
    step: Callable[..., tuple[Any, dict[str, jax.Array]]]
    validate: Callable[..., tuple[RunState, jax.Array]]
    layout: RunState
    memory: Callable[[Any], int | None]


# What a run may do where its memory does not suffice.
ADVICE = (
    "let a device take fewer candidates at a time (--population-chunk 1 is the least), give a "
    "smaller --method.population or --method.tasks, shorter windows or runs, smaller tasks, or "
    "more devices"
)


def train(
    trainer: MetaTrainer,
    theta: Theta,
    *,
    steps: int,
    seed: int,
    out: str | os.PathLike[str],
    config: Mapping[str, Any],
    validate: Callable[[Theta, Key], jax.Array],
    minutes: float = 0.0,
    validate_every: int = 25,
    checkpoint_every: int = 25,
    label: str = "meta-training",
    about: str = "",
    overwrite: bool = False,
    resume_changed: bool = False,
    tensorboard: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Theta, float]:
    """Meta-trains for `steps` steps; continues the run in the folder `out`, if there is one.

    On SIGTERM it finishes and saves the current step. With several processes, each calls it with
    the same arguments, and all of them see the folder `out`.

    Args:
      trainer: the method; its `step` is jitted here.
      theta: initial meta-parameters.
      steps: meta-updates of the whole run.
      seed: fixes all randomness. Step i uses ``fold_in(key(seed), i)``, so that a resumed run
        continues exactly the same run.
      out: folder of the run: ``config.json``, ``metrics.jsonl``, ``states/`` (orbax).
      config: plain JSON data that must be the same when a run is resumed.
      validate: ``(theta, key) -> loss`` on held-out runs; the same key at every call.
      minutes: the run ends after the step in which this time is exceeded. The time of earlier
        parts, up to their last checkpoints, counts. 0: no bound.
      validate_every: steps between two validations.
      checkpoint_every: steps between two checkpoints.
      label: shown by the progress bar.
      about: shown above the progress bar.
      overwrite: start afresh where `out` holds a run.
      resume_changed: go on with a run of another configuration, with a warning that names what
        differs.
      tensorboard: write event files to ``out/tensorboard`` as well.
      mesh: the devices that `trainer` spreads its work over; None: one device.

    Returns:
      The theta with the lowest validation loss, and that loss. Where no validation loss was
      finite, the initial theta and inf, after a warning at the first validation.

    Raises:
      ValueError: steps < 1, minutes < 0, `out` holds a run with another configuration, or
        checkpoints of which none can be read. What is in the folder stays as it is.
      MemoryError: a meta-update needs more memory than there is, or memory ran out.
      OSError: the disk is full; the last complete checkpoint is kept.
      Terminated: SIGTERM came; the state is saved.
    """
    if steps < 1:
        raise ValueError(f"train: steps must be at least 1, got {steps}.")
    if not minutes >= 0:
        raise ValueError(f"train: minutes must not be negative, got {minutes}.")
    folder, config = Path(out).absolute(), json.loads(json.dumps(dict(config)))
    plan = _Plan(steps, 60.0 * minutes, validate_every, checkpoint_every)
    programs = _programs(trainer, theta, validate, seed, mesh)
    with (
        run_folder.claimed(folder, config, overwrite, resume_changed) as claim,
        run_folder.full_disk_explained(folder),
        memory.explained("meta-training", ADVICE),
        sigterm_noted() as signals,
    ):
        # What can fail comes before anything in the folder changes.
        saved = None
        if claim.starts:
            saved = _start(programs, config)
            _check_memory(programs, saved, mesh)
            claim.begin()
        with states.manager(folder) as checkpoints:
            if saved is None:
                saved = states.restore_newest(checkpoints, programs.layout)
                if saved is None:  # killed before its first checkpoint
                    saved = _start(programs, config)
                else:
                    run_folder.check_restored(folder, saved.config, config, resume_changed)
                    saved = saved._replace(config=config)
                _check_memory(programs, saved, mesh)
                claim.begin()
            with log(folder, saved.step, steps, label, tensorboard, about) as write:
                saved, terminated = _loop(saved, programs, plan, checkpoints, write, signals)
    if terminated:
        raise Terminated(folder, saved.step)
    return saved.state.best, float(saved.state.best_loss)


def _start(programs: _Programs, config: Mapping[str, Any]) -> Saved:
    """A run before its first step. The initial theta competes: no run exports anything worse."""
    state, loss = programs.validate(programs.first())
    if not np.isfinite(loss):
        warnings.warn(
            f"the held-out loss of the initial theta is {loss}. Unless it becomes finite, the run "
            "exports the theta that it begins with: stop it and look for what is not finite in the "
            "loss, or give a smaller horizon or another start.",
            stacklevel=3,
        )
    return Saved(step=0, state=state, seconds=0.0, config=config)


def _check_memory(programs: _Programs, saved: Saved, mesh: Mesh | None) -> None:
    """Raises `MemoryError` if a meta-update needs more memory than there is."""
    devices = list(jax.local_devices()[:1] if mesh is None else mesh.local_devices)
    needed = programs.memory(saved.state.trainer)
    if needed is not None and devices[0].platform == "cpu":  # they share the host's memory
        needed *= len(devices)
    memory.check("a meta-update", needed, memory.available(devices[0]), ADVICE)


def _loop(
    saved: Saved,
    programs: _Programs,
    plan: _Plan,
    checkpoints: ocp.CheckpointManager,
    write: Callable[[Mapping[str, Any]], None],
    signals: Signals,
) -> tuple[Saved, bool]:
    """Takes steps until the plan is fulfilled or SIGTERM came; whether it did."""
    begun = time.perf_counter() - saved.seconds
    late = devices.anywhere(0 < plan.seconds <= saved.seconds)[0]
    terminated = False
    while saved.step < plan.steps and not late and not terminated:
        started = time.perf_counter()
        inner, values = programs.step(np.int32(saved.step), saved.state.trainer)
        record = {name: np.asarray(value).item() for name, value in values.items()}
        now = time.perf_counter()
        record |= {"step": saved.step, "seconds": now - started}
        record["inner_steps_per_second"] = record["inner_steps"] / (now - started)
        saved = saved._replace(
            step=saved.step + 1, state=saved.state._replace(trainer=inner), seconds=now - begun
        )
        terminated, late = devices.anywhere(signals.terminated, 0 < plan.seconds <= saved.seconds)
        last = late or saved.step == plan.steps
        if saved.step % plan.validate_every == 0 or last:
            state, loss = programs.validate(saved.state)
            saved = saved._replace(state=state)
            record["validation_loss"] = float(loss)
        write(record)
        if saved.step % plan.checkpoint_every == 0 or last or terminated:
            states.save(checkpoints, saved)
        checkpoints.check_for_errors()
    return saved, terminated and saved.step < plan.steps


def _programs(
    trainer: MetaTrainer,
    theta: Theta,
    validate: Callable[[Theta, Key], jax.Array],
    seed: int,
    mesh: Mesh | None,
) -> _Programs:
    # Raw key data: plain numpy arguments, which all processes can give alike.
    keys = jax.random.key_data(jax.random.split(jax.random.key(seed), 3))
    init_bits, validate_bits, step_bits = np.asarray(keys)
    theta = jax.tree.map(np.asarray, theta)
    trainer = devices.replicated(trainer, mesh)
    validate = validate if isinstance(validate, Partial) else Partial(validate)
    validate = devices.replicated(validate, mesh)
    wrap = jax.random.wrap_key_data

    def first(trainer, bits, theta):
        theta = jax.tree.map(jnp.asarray, theta)
        # A weakly typed state would make the programs after it compile twice.
        return strong(RunState(trainer.init(wrap(bits), theta), theta, jnp.array(jnp.inf)))

    def step(trainer, bits, index, state):
        state, metrics = trainer.step(jax.random.fold_in(wrap(bits), index), state)
        return strong(state), metrics

    def keep_best(trainer, validate, bits, state: RunState):
        current = trainer.theta(state.trainer)
        loss = validate(current, wrap(bits))
        better = loss < state.best_loss
        best = optax.tree.where(better, current, state.best)
        return RunState(state.trainer, best, jnp.where(better, loss, state.best_loss)), loss

    shapes = jax.eval_shape(first, trainer, init_bits, theta)
    inner, whole = trainer.specs(shapes.trainer), devices.WHOLE
    specs = devices.specs_of(shapes)._replace(trainer=inner)
    first = devices.jit(first, mesh, specs)
    step = devices.jit(step, mesh, (inner, whole))
    keep_best = devices.jit(keep_best, mesh, (specs, whole))
    return _Programs(
        first=lambda: first(trainer, init_bits, theta),
        step=lambda index, state: step(trainer, step_bits, index, state),
        validate=lambda state: keep_best(trainer, validate, validate_bits, state),
        layout=_layout(shapes, specs, mesh),
        memory=lambda state: cpu.memory_of(step, trainer, step_bits, np.int32(0), state),
    )


def _layout(shapes: RunState, specs: RunState, mesh: Mesh | None) -> RunState:
    """Shapes of the state and where it is to lie."""
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: here, shapes)
    else:
        places = devices.placed(specs, mesh)
    placed = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(placed, shapes, places)
