"""What `optax.tree` lacks: finiteness, leaf names, sizes, and a check that two trees fit."""

from typing import Any

import jax
import jax.numpy as jnp


def all_finite(*trees: Any) -> jax.Array:
    """True iff no leaf of the given trees holds NaN or inf (a scalar bool array).

    By minimum and maximum, which propagate both. An element-wise test costs memory: XLA on CPUs
    stores its bools, for all leaves at once.
    """
    leaves = [leaf for leaf in map(jnp.asarray, jax.tree.leaves(trees)) if leaf.size]
    dtype = jnp.result_type(float)
    extremes = [f(leaf).astype(dtype) for leaf in leaves for f in (jnp.min, jnp.max)]
    return jnp.all(jnp.isfinite(jnp.stack(extremes))) if extremes else jnp.array(True)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as ``"Dense_0/kernel"``; the root of a bare array is ``"params"``.

    The ``.value`` of Flax NNX's variables is left out: gradients come without.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def leaf_names(tree: Any) -> list[str]:
    """The names of all leaves, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def check_float_tree(where: str, tree: Any) -> None:
    """Raises `ValueError` unless every leaf is a real floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        try:
            dtype = jnp.asarray(leaf).dtype
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: leaf {path_name(path)!r} is a {type(leaf).__name__}, no array."
            ) from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{where}: leaf {path_name(path)!r} has dtype {dtype}, but only real "
                "floating-point leaves can be optimized; leave it out with optax.masked."
            )


def check_same_structure(where: str, expected: Any, given: Any) -> None:
    """Raises `ValueError` naming the leaves in which `given` differs from `expected`.

    Compared are leaf names and shapes; `expected` may hold anything with a shape.
    """
    shapes = [dict(zip(leaf_names(t), jax.tree.leaves(t), strict=True)) for t in (expected, given)]
    missing = sorted(shapes[0].keys() - shapes[1].keys())
    extra = sorted(shapes[1].keys() - shapes[0].keys())
    if missing or extra:
        parts = [f"missing {missing}"] * bool(missing) + [f"unexpected {extra}"] * bool(extra)
        raise ValueError(f"{where}: the tree has other leaves than expected: {'; '.join(parts)}.")
    for name, leaf in shapes[0].items():
        if jnp.shape(leaf) != jnp.shape(shapes[1][name]):
            raise ValueError(
                f"{where}: leaf {name!r} has shape {jnp.shape(shapes[1][name])}, "
                f"expected {jnp.shape(leaf)}."
            )


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
