"""VeLO's meta-parameters by name: their layout, and the reader of published files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

from metaopt.core.types import Theta
from metaopt.optimizers.velo_features import GROUP_SIZES, NUM_FEATURES

MAX_FILE_BYTES = 1 << 30  # the published file has 9 MB

_LSTM = ("rnn_params", "rnn/linear")  # one module of that name, not a path of two
_BANK = ("ff_mod_stack", "~")


def velo_shapes(hidden: int, bank: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path of every leaf of theta -> its shape."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {
        ("lstm_init_state", "hidden"): (1, hidden),
        ("lstm_init_state", "cell"): (1, hidden),
    }
    linear = {
        ("rnn_params", "linear"): (NUM_FEATURES, hidden),  # not used; published files have it
        ("rnn_params", "linear_1"): (NUM_FEATURES, hidden),
        ("rnn_params", "linear_2"): (NUM_FEATURES, hidden),
        _LSTM: (2 * hidden, 4 * hidden),
        ("rnn_params", "rnn_to_controls"): (hidden, bank),
        ("rnn_params", "step_size"): (hidden, 1),
    }
    for path, (n_in, n_out) in linear.items():
        shapes[(*path, "w")] = (n_in, n_out)
        shapes[(*path, "b")] = (n_out,)
    for k, size in enumerate(GROUP_SIZES):
        shapes[(*_BANK, f"w0__{k}")] = (bank, size, 4)
    for name, shape in {"w1": (4, 4), "w2": (4, 3), "b0": (4,), "b1": (4,), "b2": (3,)}.items():
        shapes[(*_BANK, name)] = (bank, *shape)
    return shapes


def flatten(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested dicts as ``{("a", "b", "c"): leaf}``."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    flat: dict[tuple[str, ...], Any] = {}
    for key, branch in tree.items():
        flat.update(flatten(branch, (*path, str(key))))
    return flat


def _named(tree: Any) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flatten(tree).items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(name[:60] for name in names[:6]) + more


def _check_leaves(named: Mapping[str, Any], who: str) -> dict[tuple[str, ...], Any]:
    """The leaves by path; `ValueError` where names or shapes are not those of one VeLO."""
    reference = {"/".join(path): path for path in velo_shapes(1, 1)}
    missing = sorted(reference.keys() - named.keys())
    foreign = sorted(named.keys() - reference.keys())
    if missing or foreign:
        causes = [f"missing: {_some(missing)}"] if missing else []
        causes += [f"not known: {_some(foreign)}"] if foreign else []
        raise ValueError(f"{who}: these are not VeLO's meta-parameters; {'; '.join(causes)}.")
    controls = jnp.shape(named["rnn_params/rnn_to_controls/w"])
    if len(controls) != 2 or 0 in controls:
        raise ValueError(
            f"{who}: rnn_params/rnn_to_controls/w must be [hidden, bank], got {controls}. "
            "(A population of thetas is used under jax.vmap.)"
        )
    wrong = [
        f"{'/'.join(path)} is {jnp.shape(named['/'.join(path)])}, not {shape}"
        for path, shape in velo_shapes(*controls).items()
        if jnp.shape(named["/".join(path)]) != shape
    ]
    if wrong:
        raise ValueError(
            f"{who}: with hidden={controls[0]} and bank={controls[1]} (from rnn_to_controls/w), "
            f"{'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}."
        )
    return {path: named[name] for name, path in reference.items()}


def check_theta(theta: Theta, who: str) -> None:
    """Raises `ValueError` unless `theta` has the names and the shapes of one VeLO, of any size."""
    if not isinstance(theta, Mapping):
        raise ValueError(f"{who}: theta must be a dict as `init` makes it, got {type(theta)}.")
    _check_leaves(_named(theta), who)


def _nested(leaves: Mapping[tuple[str, ...], Any]) -> Theta:
    theta: dict[str, Any] = {}
    for (*path, leaf), value in leaves.items():
        branch = theta
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return theta


def _theta_from_named(named: Mapping[str, Any], who: str) -> Theta:
    leaves = _check_leaves(named, who)
    for path, value in leaves.items():
        array = np.asarray(value)
        with np.errstate(over="ignore"):  # too large for float32: infinite, hence refused
            usable = jnp.issubdtype(array.dtype, jnp.floating) and np.all(
                np.isfinite(array.astype(np.float32))
            )
        if not usable:
            raise ValueError(f"{who}: {'/'.join(path)} must hold finite floating-point numbers.")
        leaves[path] = jnp.asarray(array, jnp.float32)
    return _nested(leaves)


def velo_theta_from_named(named: Mapping[str, np.ndarray]) -> Theta:
    """theta from a flat dict of arrays, named as the published files name them.

    Args:
      named: for instance ``{"rnn_params/step_size/w": ..., "ff_mod_stack/~/w0__0": ...}``, with
        or without ``theta/`` in front of every name. Sizes are read from the shapes.

    Returns:
      theta in float32, for `velo(...).apply(theta, num_steps=...)`.

    Raises:
      ValueError: names missing or unknown (both are listed), shapes that do not fit one
        another, or values that are not finite floating-point numbers.
    """
    plain = {str(name).removeprefix("theta/"): value for name, value in named.items()}
    if len(plain) != len(named):
        raise ValueError("velo_theta_from_named: names occur with and without 'theta/' in front.")
    return _theta_from_named(plain, "velo_theta_from_named")


def load_velo(path: str | os.PathLike[str]) -> Theta:
    """Reads a published VeLO file; needs neither TensorFlow nor gin nor haiku.

    Args:
      path: a flax msgpack file of ``{"params": theta, ...}``, of the bare theta, or of the tuple
        ``(theta, ...)``. Sizes are read from the shapes.

    Returns:
      theta in float32: ``velo().apply(load_velo(path), num_steps=...)``.

    Raises:
      ValueError: the file is not msgpack, is cut short, is larger than 1 GiB, or holds something
        other than VeLO's meta-parameters; the message names the file and the cause.
      OSError: the file cannot be read.

    Reading is safe for files of unknown origin: msgpack holds data only, nothing is executed.
    """
    file = Path(path)
    who = f"load_velo({str(file)!r})"
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{who}: the file has {size} bytes; a VeLO has about 9 million.")
    try:
        content = serialization.msgpack_restore(file.read_bytes())
    except Exception as error:  # msgpack, flax and numpy each raise their own kinds
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"{who}: not a whole flax msgpack file ({cause[:200]}).") from error
    for key in ("params", "0"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{who}: holds a {kind}, not a dict of meta-parameters.")
    return _theta_from_named(_named(content), who)
