"""Meshes of devices whose axes are explicit, that is, part of the type of every array."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def with_auto_axes(function: Callable[..., Any], *arguments: Any, like: Any) -> Any:
    """Calls `function`, in which XLA chooses how arrays are split over explicit axes of a mesh.

    This is for functions whose operations JAX refuses on arrays that are split along explicit axes,
    such as a concatenation of arrays that are split in several ways. Without explicit axes it is
    ``function(*arguments)``.

    Args:
      function: a function of trees of arrays, which uses no other arrays.
      *arguments: its arguments.
      like: a tree with the structure of the result; the result is split as its leaves are.

    Returns:
      The result of `function`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not axes:
        return function(*arguments)
    # An array that was made outside of the mesh has none.
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), like)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*arguments)
