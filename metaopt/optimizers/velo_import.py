"""VeLO's meta-parameters by name: checks of their layout, and the reader of published files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.traverse_util import unflatten_dict

from metaopt.core.types import Theta
from metaopt.optimizers.velo_networks import theta_shapes

MAX_FILE_BYTES = 1 << 30  # the published file has 9 MB


def load_velo(path: str | os.PathLike[str]) -> Theta:
    """Reads a published VeLO file; needs neither TensorFlow nor gin nor haiku.

    Reading is safe for files of unknown origin: msgpack holds data only, nothing is executed.

    Args:
      path: a flax msgpack file of ``{"params": theta, ...}``, of the bare theta, or of the tuple
        ``(theta, ...)``. Sizes are read from the shapes.

    Returns:
      theta in float32: ``velo().apply(load_velo(path), num_steps=...)``.

    Raises:
      ValueError: when the file is not msgpack, is cut short, is larger than 1 GiB, or holds
        something other than VeLO's meta-parameters. The message names the file and the cause.
      OSError: when the file cannot be read.
    """
    file = Path(path)
    caller = f"load_velo({str(file)!r})"
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{caller}: the file has {size} bytes; a VeLO has about 9 million.")
    try:
        content = serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # msgpack, flax and numpy each raise their own kinds
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"{caller}: not a whole flax msgpack file ({cause[:200]}).") from error
    for key in ("params", "0"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{caller}: holds a {kind}, not a dict of meta-parameters.")
    return _theta_from_named(leaves_by_name(content), caller)


def velo_theta_from_named(named: Mapping[str, np.ndarray]) -> Theta:
    """Makes theta from a flat dict of arrays, named as the published files name them.

    Args:
      named: for example ``{"rnn_params/step_size/w": ..., "ff_mod_stack/~/w0__0": ...}``, with
        or without ``theta/`` in front of every name. Sizes are read from the shapes.

    Returns:
      theta in float32, for `velo(...).apply(theta, num_steps=...)`.

    Raises:
      ValueError: when names are missing or unknown (both are listed), shapes do not fit one
        another, or values are not finite floating-point numbers.
    """
    plain = {str(name).removeprefix("theta/"): value for name, value in named.items()}
    if len(plain) != len(named):
        raise ValueError("velo_theta_from_named: names occur with and without 'theta/' in front.")
    return _theta_from_named(plain, "velo_theta_from_named")


def check_theta(theta: Theta, caller: str) -> None:
    """Checks names and shapes of the meta-parameters of a VeLO of any size.

    Args:
      theta: what `init` of `velo` returns.
      caller: start of error messages.

    Raises:
      ValueError: when `theta` is of another structure.
    """
    if not isinstance(theta, Mapping):
        raise ValueError(f"{caller}: theta must be a dict as `init` makes it, got {type(theta)}.")
    _check_leaves(leaves_by_name(theta), caller)


def leaves_by_name(tree: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the leaves of nested dicts by name, such as ``"rnn_params/step_size/w"``."""
    if not isinstance(tree, Mapping):
        return {"/".join(path): tree}
    leaves: dict[str, Any] = {}
    for key, branch in tree.items():
        leaves.update(leaves_by_name(branch, (*path, str(key))))
    return leaves


def _theta_from_named(named: Mapping[str, Any], caller: str) -> Theta:
    leaves = _check_leaves(named, caller)
    for path, value in leaves.items():
        array = np.asarray(value)
        with np.errstate(over="ignore"):  # too large for float32: infinite, hence refused
            is_usable = jnp.issubdtype(array.dtype, jnp.floating) and np.all(
                np.isfinite(array.astype(np.float32))
            )
        if not is_usable:
            raise ValueError(f"{caller}: {'/'.join(path)} must hold finite floating-point numbers.")
        leaves[path] = jnp.asarray(array, jnp.float32)
    return unflatten_dict(leaves)


def _check_leaves(named: Mapping[str, Any], caller: str) -> dict[tuple[str, ...], Any]:
    """Returns the leaves by path.

    Raises:
      ValueError: when names or shapes are not those of one VeLO.
    """
    paths = {"/".join(path): path for path in theta_shapes(hidden=1, bank=1)}
    missing = sorted(paths.keys() - named.keys())
    unknown = sorted(named.keys() - paths.keys())
    if missing or unknown:
        causes = []
        if missing:
            causes.append(f"missing: {_first_names(missing)}")
        if unknown:
            causes.append(f"not known: {_first_names(unknown)}")
        raise ValueError(f"{caller}: these are not VeLO's meta-parameters; {'; '.join(causes)}.")
    controls = jnp.shape(named["rnn_params/rnn_to_controls/w"])
    if len(controls) != 2 or 0 in controls:
        raise ValueError(
            f"{caller}: rnn_params/rnn_to_controls/w must be [hidden, bank], got {controls}. "
            "(A population of thetas is used under jax.vmap.)"
        )
    hidden, bank = controls
    wrong = []
    for path, shape in theta_shapes(hidden, bank).items():
        name = "/".join(path)
        if jnp.shape(named[name]) != shape:
            wrong.append(f"{name} is {jnp.shape(named[name])}, not {shape}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{caller}: with hidden={hidden} and bank={bank} (from rnn_to_controls/w), "
            f"{'; '.join(wrong[:3])}{more}."
        )
    return {path: named[name] for name, path in paths.items()}


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(name[:60] for name in names[:6]) + more
