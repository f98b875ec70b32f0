"""What `optax.tree` lacks: finiteness, leaf names, sizes, and checks of a tree's structure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

LARGEST_STACKED = 4096  # elements of a leaf


def all_finite(*trees: Any) -> Bool[Array, ""]:
    """Whether no leaf of the given trees contains NaN or inf; integers and random keys do not.

    Tests the minimum and the maximum of each leaf, which propagate both. An element-wise test
    costs memory: XLA on CPU stores its results, for all leaves at once.
    """
    leaves = [
        leaf
        for leaf in map(jnp.asarray, jax.tree.leaves(trees))
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if not leaves:
        return jnp.array(True)
    dtype = jnp.result_type(float)
    is_complex = jnp.iscomplexobj  # the order of complex numbers looks at their real parts first
    parts = [(leaf.real, leaf.imag) if is_complex(leaf) else (leaf,) for leaf in leaves]
    stacks = stacks_of([part for leaf_parts in parts for part in leaf_parts])
    extremes = [f(stack).astype(dtype) for _, stack in stacks for f in (jnp.min, jnp.max)]
    return jnp.all(jnp.isfinite(jnp.stack(extremes)))


def stacks_of(trees: Sequence[Any]) -> list[tuple[tuple[int, ...], Any]]:
    """Stacks small trees of equal types along a new first axis; a large one stays alone.

    Real networks have hundreds of biases and scales, of few shapes. One vectorised program for each
    shape compiles in a fraction of the time of one program for each leaf. Copies of large leaves
    would take more time than an update of VeLO. Types of arrays hold shape and dtype and, on an
    explicit mesh, the sharding.

    Args:
      trees: trees of arrays; a tree is as large as its largest leaf.

    Returns:
      For each stack the positions of its n trees, and the stack, whose leaves are ``[n, ...]``.
    """
    groups: dict[Any, list[int]] = {}
    for index, tree in enumerate(trees):
        leaves, structure = jax.tree.flatten(tree)
        is_small = all(leaf.size <= LARGEST_STACKED for leaf in leaves)
        key = (structure, *map(jax.typeof, leaves)) if is_small else index
        groups.setdefault(key, []).append(index)
    return [
        (tuple(group), jax.tree.map(lambda *xs: jnp.stack(xs), *[trees[i] for i in group]))
        for group in groups.values()
    ]


def add_to_count(count: jax.Array, number: Any = 1) -> jax.Array:
    """Returns ``count + number``; an integer stays at the largest one instead of wrapping around.

    Args:
      count: a count ``[...]``.
      number: what to add, 0 or more.
    """
    number = jnp.asarray(number).astype(count.dtype)
    if not jnp.issubdtype(count.dtype, jnp.integer):
        return count + number
    most = jnp.iinfo(count.dtype).max
    return jnp.where(count > most - number, most, count + number).astype(count.dtype)


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf, for example ``"Dense_0/kernel"``.

    Args:
      path: a key path as in `jax.tree_util.tree_leaves_with_path`.

    Returns:
      The keys joined by ``/``. A bare array, which has no keys, is called ``"params"``. The final
      ``.value`` of Flax NNX's variables is left out, because their gradients do not have it.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/") or "params"


def leaf_names(tree: Any) -> list[str]:
    """The names of all leaves, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def check_float_tree(where: str, tree: Any) -> None:
    """Checks that every leaf is a real floating-point array.

    Args:
      where: the tree's name in the message.
      tree: the tree.

    Raises:
      ValueError: for the first other leaf, by its name.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        try:
            dtype = jnp.asarray(leaf).dtype
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}: leaf {name!r} is a {type(leaf).__name__}, not an array."
            ) from None
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(complex_leaf(where, name, dtype))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{where}: leaf {name!r} has dtype {dtype}, but only real floating-point leaves "
                "can be optimized; keep it out of params, as another argument of the loss."
            )


def complex_leaf(where: str, name: str, dtype: Any) -> str:
    """The message that a leaf is complex."""
    return (
        f"{where}: leaf {name!r} has dtype {dtype}, but only real floating-point leaves can be "
        "optimized; give its real and its imaginary part as two leaves, and join them in the loss."
    )


def check_same_structure(where: str, expected: Any, given: Any) -> None:
    """Checks that two trees have the same leaf names and shapes.

    Args:
      where: the given tree's name in the message.
      expected: the required tree; its leaves are arrays, or anything else with a shape.
      given: the tree to check.

    Raises:
      ValueError: when leaves are missing, unexpected, or of another shape; names them.
    """
    expected_leaves = dict(zip(leaf_names(expected), jax.tree.leaves(expected), strict=True))
    given_leaves = dict(zip(leaf_names(given), jax.tree.leaves(given), strict=True))
    missing = sorted(expected_leaves.keys() - given_leaves.keys())
    unexpected = sorted(given_leaves.keys() - expected_leaves.keys())
    if missing or unexpected:
        differences = []
        if missing:
            differences.append(f"missing {missing}")
        if unexpected:
            differences.append(f"unexpected {unexpected}")
        raise ValueError(
            f"{where}: the tree has other leaves than expected: {'; '.join(differences)}."
        )
    for name, leaf in expected_leaves.items():
        expected_shape, given_shape = jnp.shape(leaf), jnp.shape(given_leaves[name])
        if expected_shape != given_shape:
            raise ValueError(
                f"{where}: leaf {name!r} has shape {given_shape}, expected {expected_shape}."
            )


def check_same_leaves(where: str, expected: Any, given: Any) -> None:
    """Checks that two trees have the same structure, and leaves of the same shapes and dtypes.

    Args:
      where: the given tree's name in the message.
      expected: the required tree of arrays.
      given: the tree to check.

    Raises:
      ValueError: for the first leaf that is missing, unexpected, or of another shape or dtype.
    """
    check_same_structure(where, expected, given)
    for name, old, new in zip(
        leaf_names(expected), jax.tree.leaves(expected), jax.tree.leaves(given), strict=True
    ):
        old_dtype, new_dtype = jnp.asarray(old).dtype, jnp.asarray(new).dtype
        if old_dtype != new_dtype:
            raise ValueError(f"{where}: leaf {name!r} has dtype {new_dtype}, expected {old_dtype}.")
    structures = jax.tree.structure(expected), jax.tree.structure(given)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{where}: the tree has the structure {structures[1]}, expected {structures[0]}."
        )


def cast_like(example: Any, tree: Any) -> Any:
    """Casts `tree` to the dtypes of `example` and strips weak types, as branches must agree."""

    def cast(like, leaf):
        leaf, dtype = jnp.asarray(leaf), jnp.asarray(like).dtype
        # Random keys have no `astype`.
        return leaf if jnp.issubdtype(dtype, jax.dtypes.extended) else leaf.astype(dtype)

    return jax.tree.map(cast, example, tree)


def outermost(tree: Any, is_wanted: Callable[[Any], bool]) -> Any:
    """The first node that `is_wanted` accepts and that is not within another, or None."""
    return next(filter(is_wanted, jax.tree.leaves(tree, is_leaf=is_wanted)), None)


def with_nodes_of(make_example: Callable[[], Any], tree: Any) -> Any:
    """The tree with the nodes of an example, where a library has made mappings of them.

    `flax.nnx.Optimizer` keeps a named tuple within a state's tree of params as a mapping of its
    fields, without those that are None.

    Args:
      make_example: ``() -> example``; only traced, and only if the tree contains a mapping that is
        no dict.
      tree: with the leaves of the example.
    """
    is_foreign = lambda node: isinstance(node, Mapping) and not isinstance(node, dict)
    if outermost(tree, is_foreign) is None:
        return tree
    example = jax.eval_shape(make_example)
    same = jax.tree.structure(example) == jax.tree.structure(tree)
    return tree if same else _with_nodes_of(example, tree)


def _with_nodes_of(example: Any, node: Any) -> Any:
    if isinstance(example, tuple) and hasattr(example, "_fields"):
        get = node.get if isinstance(node, Mapping) else lambda name: getattr(node, name)
        kind: Any = type(example)
        return kind(**{f: _with_nodes_of(getattr(example, f), get(f)) for f in kind._fields})
    if isinstance(example, list | tuple):
        keys = range(len(example))
        parts = [_with_nodes_of(part, node[key]) for part, key in zip(example, keys, strict=True)]
        return type(example)(parts)
    if isinstance(example, Mapping) and isinstance(node, Mapping):
        make: Any = type(node)
        return make({key: _with_nodes_of(example[key], node[key]) for key in example})
    return node


def nbytes(tree: Any) -> int:
    """The total size in bytes of a tree of arrays or `jax.ShapeDtypeStruct`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
