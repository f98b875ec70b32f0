"""Checkpoints of a run: written in the background, and checked by a checksum when read."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from metaopt.core.types import Theta

STATES, DAMAGED = "states", "damaged"


class RunState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
      trainer: state of the `MetaTrainer`.
      best: the theta with the lowest validation loss so far.
      best_loss: float32 []; its validation loss.
    """

    trainer: Any
    best: Theta
    best_loss: jax.Array


class Saved(NamedTuple):
    """A checkpoint.

    Attributes:
      step: number of meta-updates so far.
      state: the state after them.
      seconds: time of training so far.
      config: configuration of the run, as plain JSON data.
    """

    step: int
    state: RunState
    seconds: float
    config: Mapping[str, Any]


@contextlib.contextmanager
def manager(folder: Path):
    """Yields orbax's manager of the checkpoints of a run, which keeps the last two.

    Args:
      folder: of the run.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    checkpoints = ocp.CheckpointManager(
        folder / STATES, item_names=("state", "facts"), options=options
    )
    try:
        yield checkpoints
        checkpoints.wait_until_finished()
    finally:
        checkpoints.close()


def save(checkpoints: ocp.CheckpointManager, saved: Saved) -> None:
    """Copies the state and writes it in the background.

    Args:
      checkpoints: from `manager`; a later call of it raises the errors of writing.
      saved: the checkpoint.
    """
    facts = {
        "sha256": checksum(saved.state),
        "seconds": saved.seconds,
        "config": dict(saved.config),
    }
    facts["sha256_of_facts"] = _facts_checksum(saved.step, facts)
    checkpoints.save(
        saved.step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(saved.state),  # type: ignore
            facts=ocp.args.JsonSave(facts),  # type: ignore
        ),
    )


def restore_newest(checkpoints: ocp.CheckpointManager, like: RunState) -> Saved | None:
    """Reads the newest intact checkpoint.

    Damaged ones that are newer are moved to the folder ``damaged``, with a warning.

    Args:
      checkpoints: from `manager`.
      like: `jax.ShapeDtypeStruct`s whose shardings say on which devices to place the state. It
        may have been saved on others.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: when there are checkpoints, but none can be read.
    """
    problems: dict[int, str] = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            saved = _read(checkpoints, step, like)
        except Exception as error:  # damaged files make orbax raise errors of many kinds
            problems[step] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            continue
        for damaged, problem in problems.items():
            _set_aside(Path(checkpoints.directory), damaged)
            warnings.warn(
                f"the checkpoint of step {damaged} is damaged ({problem}); the run continues from "
                f"step {step}.",
                stacklevel=2,
            )
        if problems:
            checkpoints.reload()
        return saved
    if problems:
        raise ValueError(
            f"{checkpoints.directory}: no checkpoint can be read, or they are of another kind of "
            f"run ({problems}). Choose another folder, or start afresh with --overwrite True."
        )
    return None


def _read(checkpoints: ocp.CheckpointManager, step: int, like: RunState) -> Saved:
    """A checkpoint; raises if it is damaged."""
    read = checkpoints.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(like),  # type: ignore
            facts=ocp.args.JsonRestore(),  # type: ignore
        ),
    )
    state, facts = read["state"], read["facts"]
    if facts.pop("sha256_of_facts") != _facts_checksum(step, facts):
        raise ValueError("its facts do not have the checksum that was saved with them")
    if facts["sha256"] != checksum(state):
        raise ValueError("its values do not have the checksum that was saved with them")
    return Saved(step=step, state=state, seconds=facts["seconds"], config=facts["config"])


def _set_aside(states: Path, step: int) -> None:
    """Moves a damaged checkpoint to a folder beside `states`, where a person can inspect it."""
    if jax.process_index() == 0:
        target = states.parent / DAMAGED / str(step)
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(f"{target.name}-again")
        os.replace(states / str(step), target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"set aside {step}")


def _facts_checksum(step: int, facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([step, facts], sort_keys=True).encode()).hexdigest()


def checksum(tree: Any) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all leaves.

    Args:
      tree: arrays, which may be distributed over processes.

    Returns:
      The digest in hexadecimal.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
