"""Weights from elsewhere: files of installed packages, and trees that must fit a network."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from metaopt.core.extras import MissingExtra, optional_imports
from metaopt.core.trees import leaf_names


class Pretrained(NamedTuple):
    """A network with trained weights.

    Attributes:
      net: the Linen module.
      variables: its collections, ``{"params": ..., "batch_stats": ...}``.
    """

    net: nn.Module
    variables: dict[str, Any]


def installed_file(
    wheel: str, package: str, file: str, *, needed_by: str, no_extra: bool = False
) -> Path:
    """A file of an installed package, which is not imported.

    Args:
      wheel: what pip calls the package.
      package: what Python calls it.
      file: the path of the file within it.
      needed_by: what the user called, for the message.
      no_extra: the package is in no extra, because it declares heavy dependencies.

    Raises:
      MissingExtra: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        if no_extra:
            message = f"{needed_by} needs {wheel}: pip install --no-deps {wheel}"
            raise MissingExtra(message, name=wheel)
        with optional_imports("pretrained", needed_by=needed_by):
            raise ModuleNotFoundError(f"no module named {package!r}", name=wheel)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / file


def tree_of(where: str, named: Mapping[str, np.ndarray], expected: Any) -> dict[str, Any]:
    """A tree of arrays of their names, which must be those of a network.

    Args:
      where: the file, for messages.
      named: arrays by their path in the tree, ``"params/Dense_0/kernel"``.
      expected: the tree of the network, of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The tree, in the dtypes of `expected`.

    Raises:
      ValueError: for the first leaf that is missing, of another shape, or too much; see
        `check_fits`.
    """
    tree = unflatten_dict({tuple(name.split("/")): array for name, array in named.items()})
    check_fits(where, expected, tree)
    return jax.tree.map(lambda like, array: jnp.asarray(array, like.dtype), dict(expected), tree)


def check_fits(where: str, expected: Any, given: Any) -> None:
    """Checks that the weights of a checkpoint are those of a network.

    Args:
      where: the checkpoint's name in the message.
      expected: the tree of the network, of arrays or `jax.ShapeDtypeStruct`.
      given: the tree of the checkpoint.

    Raises:
      ValueError: names the first leaf that differs, and the shapes.
    """
    ours = dict(zip(leaf_names(expected), jax.tree.leaves(expected), strict=True))
    theirs = dict(zip(leaf_names(given), jax.tree.leaves(given), strict=True))
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        shapes = [
            f"of shape {tuple(jnp.shape(leaves[name]))}" if name in leaves else "missing"
            for leaves in (theirs, ours)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{where}: does not fit the network: leaf {name!r} is {shapes[0]} in the "
                f"checkpoint, and {shapes[1]} in the network."
            )
