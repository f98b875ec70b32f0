"""Trees: finiteness, names of leaves, and whether two trees fit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from metaopt.core import trees

TREE = {"a": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "c": [jnp.float32(1), jnp.zeros((0, 2))]}
NAMES = ["a/b", "a/w", "c/0", "c/1"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_number_that_is_not_finite_is_found_in_any_leaf(value, place):
    assert trees.all_finite(TREE)
    leaves, structure = jax.tree.flatten(TREE)
    leaves[place] = jnp.atleast_1d(leaves[place]).at[-1].set(value)
    assert not trees.all_finite(jax.tree.unflatten(structure, leaves))
    assert not trees.all_finite(TREE, {"more": leaves[place]})


@pytest.mark.parametrize("number", [complex(0, np.inf), complex(-1, np.nan), complex(np.inf, 0)])
def test_both_parts_of_a_complex_number_must_be_finite(number):
    finite = jnp.array([1 + 2j, -3j])
    assert trees.all_finite(finite) and not trees.all_finite(finite.at[0].set(number))


def test_a_count_stays_at_the_largest_number():
    largest = 2**31 - 1
    counts = jnp.array([0, largest - 2, largest - 1, largest], jnp.int32)
    np.testing.assert_array_equal(trees.add_to_count(counts, 2), [2, *[largest] * 3])
    np.testing.assert_array_equal(trees.add_to_count(counts, False), counts)
    assert trees.add_to_count(counts, True).dtype == jnp.int32
    assert trees.add_to_count(jnp.float32(1.5)) == 2.5  # as some schedules count


def test_integers_and_trees_without_numbers_are_finite():
    assert trees.all_finite({"n": jnp.arange(3)}, True)
    assert trees.all_finite({}, jnp.zeros((0, 2)))


def test_leaves_are_named_by_their_paths():
    assert trees.leaf_names(TREE) == NAMES
    assert trees.leaf_names(jnp.ones(3)) == ["params"]
    names = trees.leaf_names(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))
    assert sorted(names) == ["bias", "kernel"]  # as in gradients, which have no `.value`


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.arange(3), "f: leaf 'a/w' has dtype int32, but only real .* keep it out of params"),
        (jnp.ones(3, complex), "f: leaf 'a/w' has dtype complex64, but"),
        ("text", "f: leaf 'a/w' is a str, not an array."),
    ],
)
def test_a_leaf_that_cannot_be_optimized_is_named(leaf, message):
    trees.check_float_tree("f", TREE)
    trees.check_float_tree("f", {"x": 1.0, "h": jnp.ones(2, jnp.bfloat16)})
    with pytest.raises(ValueError, match=message):
        trees.check_float_tree("f", {"a": {"w": leaf}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 1.0}, r"f: the tree has other leaves than expected: missing \['b'\]\.$"),
        (
            {"a": 1.0, "b": jnp.ones(2), "c": 1.0},
            r"f: the tree has other leaves than expected: unexpected \['c'\]\.$",
        ),
        ({"b": 1.0, "c": 1.0}, r"missing \['a'\]; unexpected \['c'\]\.$"),
        ({"a": 1.0, "b": jnp.ones(3)}, r"f: leaf 'b' has shape \(3,\), expected \(2,\)\.$"),
    ],
)
def test_leaves_in_which_two_trees_differ_are_named(given, message):
    expected = {"a": jax.ShapeDtypeStruct((), jnp.float32), "b": np.ones(2)}
    trees.check_same_structure("f", expected, {"a": 1.0, "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=message):
        trees.check_same_structure("f", expected, given)


def test_bytes_of_a_tree_are_those_of_its_arrays():
    shapes = {"x": jax.ShapeDtypeStruct((10,), jnp.bfloat16), "n": np.zeros(3, np.int64)}
    assert trees.nbytes(TREE) == 4 * (6 + 3 + 1)
    assert trees.nbytes(shapes) == 2 * 10 + 8 * 3


class Pair(NamedTuple):
    row: Any
    col: Any


def test_named_tuples_come_back_where_a_library_made_mappings_of_them():
    make = lambda: {"state": (Pair(jnp.zeros(2), None), Pair(jnp.zeros(3), jnp.zeros(1)))}
    kept = nnx.State(
        {"state": {0: {"row": jnp.ones(2)}, 1: {"row": jnp.ones(3), "col": jnp.ones(1)}}}
    )
    back = trees.with_nodes_of(make, kept)["state"]
    assert isinstance(back, tuple) and all(isinstance(pair, Pair) for pair in back)
    assert back[0].col is None and back[0].row.sum() == 2
    assert back[1].row.sum() == 3 and back[1].col.sum() == 1


@pytest.mark.parametrize("kind", [dict, FrozenDict])
def test_trees_with_the_nodes_that_they_began_with_stay(kind):
    tree = kind({"a": Pair(jnp.ones(2), None)})
    assert trees.with_nodes_of(lambda: tree, tree) is tree
