"""The rule that VeLO, Celo, Celo2 and the adafac MLP share: a small network steps each parameter.

Each tensor of the params has accumulators. From them and the gradient come 30 columns, the inputs
of the network (`velo_features`, `velo_networks`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from metaopt.core.trees import (
    check_float_tree,
    check_same_structure,
    stacks_of,
    with_nodes_of,
)
from metaopt.core.types import Params
from metaopt.optimizers import velo_features as features
from metaopt.optimizers.velo_features import Decays, Tensor
from metaopt.optimizers.velo_networks import Layer, mlp

_LARGEST_PARAM = 1e18  # its square is far below the largest float32


class Rule(NamedTuple):
    """Constants of the rule; the defaults are those of VeLO and Celo.

    Attributes:
      decays: of the accumulators.
      clip: gradients are clipped to [-clip, clip].
      largest: a gradient with an entry of this size counts as not finite.
      v_eps: see `velo_features.columns`.
      diag_eps: see `velo_features.columns`.
      eps: is added to the mean square of each column before its root divides the column.
      per_matrix: the mean squares are taken over the last two axes, not over the whole tensor.
    """

    decays: Decays = Decays()
    clip: float = 1000.0
    largest: float = math.inf
    v_eps: float = 1e-6
    diag_eps: float = 0.0
    eps: float = 1e-5
    per_matrix: bool = False


################################################################################
# Trees
################################################################################


def init_accumulators(name: str, params: Params) -> dict[str, Any]:
    """Returns the fields `momenta`, `v` and `factored` of a new state.

    Args:
      name: name of the optimizer, for messages.
      params: the tree.

    Raises:
      ValueError: when a leaf of `params` is no floating-point array.
    """
    check_float_tree(name, params)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    return {
        "momenta": tuple(optax.tree.zeros_like(zeros) for _ in range(3)),
        "v": zeros,
        "factored": jax.tree.map(features.init_factored, zeros),
    }


class Stack(NamedTuple):
    """One tensor, or small tensors of one shape, with a new first axis (see `stacks_of`).

    Attributes:
      leaves: position of each of the n tensors among the leaves of params.
      tensor: parameters and accumulators ``[n, ...]``.
      g: gradients ``[n, ...]``.
    """

    leaves: tuple[int, ...]
    tensor: Tensor
    g: Float[Array, "n ..."]


def stack(name: str, updates: Any, state: Any, params: Params) -> list[Stack]:
    """Returns the leaves of params in float32, in stacks.

    Leaves without elements are in no stack. On an explicit mesh the tensors of a stack have one
    sharding.

    Args:
      name: name of the optimizer, for messages.
      updates: gradients.
      state: a state with the fields of `init_accumulators`.
      params: the tree.

    Raises:
      ValueError: when the trees do not fit one another.
    """
    check_same_structure(f"{name}: updates", params, updates)
    check_same_structure(f"{name}: params, compared with the state's", state.v, params)
    treedef = jax.tree.structure(params)
    leaves = [jnp.asarray(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    grads = [g.astype(jnp.float32) for g in treedef.flatten_up_to(updates)]
    momenta = zip(*[treedef.flatten_up_to(tree) for tree in state.momenta], strict=True)
    v = treedef.flatten_up_to(state.v)
    # `flax.nnx.Optimizer` makes mappings of its named tuples.
    made = with_nodes_of(lambda: init_accumulators(name, params)["factored"], state.factored)
    factored = treedef.flatten_up_to(made)
    tensors = [Tensor(*fields) for fields in zip(leaves, momenta, v, factored, strict=True)]
    nonempty = [index for index, g in enumerate(grads) if g.size]
    stacks = stacks_of([(tensors[index], grads[index]) for index in nonempty])
    # Without the barrier XLA reads the parts of a stack anew in each computation on it.
    return [
        Stack(tuple(nonempty[row] for row in rows), *jax.lax.optimization_barrier(fields))
        for rows, fields in stacks
    ]


def unstack(
    steps: list[jax.Array], stacks: list[Stack], updates: Any, state: Any, params: Params
) -> tuple[Any, Any]:
    """Returns the tree of steps, with the dtypes of `updates`, and the state with new accumulators.

    Args:
      steps: for each stack, what is added to its params.
      stacks: with new accumulators.
      updates: gradients.
      state: the state that `stack` read.
      params: the tree.
    """
    treedef = jax.tree.structure(params)
    deltas = treedef.flatten_up_to(updates)
    momenta = [treedef.flatten_up_to(tree) for tree in state.momenta]
    v, factored = treedef.flatten_up_to(state.v), treedef.flatten_up_to(state.factored)
    for step, (leaves, tensor, _) in zip(steps, stacks, strict=True):
        for row, leaf in enumerate(leaves):
            own = _rows(tensor, row)
            deltas[leaf] = step[row].astype(deltas[leaf].dtype)
            v[leaf], factored[leaf] = own.v, own.factored
            for tree, momentum in zip(momenta, own.momenta, strict=True):
                tree[leaf] = momentum
    return treedef.unflatten(deltas), state._replace(
        momenta=tuple(treedef.unflatten(tree) for tree in momenta),
        v=treedef.unflatten(v),
        factored=treedef.unflatten(factored),
    )


def rows_of(stacks: list[Stack], per_stack: list[jax.Array]) -> jax.Array:
    """Returns one row for each tensor ``[n_tensors, ...]``, in the order of the leaves.

    Args:
      stacks: the stacks.
      per_stack: for each stack, one row for each of its tensors.
    """
    order = np.argsort([leaf for stack in stacks for leaf in stack.leaves])
    return jnp.concatenate(per_stack)[order]


def row_numbers(stacks: list[Stack]) -> list[np.ndarray]:
    """Returns, for each stack, the rows of its tensors in an array that `rows_of` returns."""
    numbers = {leaf: row for row, leaf in enumerate(sorted(sum((s.leaves for s in stacks), ())))}
    return [np.array([numbers[leaf] for leaf in stack.leaves]) for stack in stacks]


def _rows(tree: Any, rows: Any) -> Any:
    return jax.tree.map(lambda x: x[rows], tree)


def are_frozen(state: Any) -> list[jax.Array]:
    """Returns whether all gradients so far of each leaf have been zero (bool ``[]``)."""
    leaves = zip(jax.tree.leaves(state.v), jax.tree.leaves(state.momenta[-1]), strict=True)
    return [(v.size > 0) & ~(jnp.any(v) | jnp.any(m)) for v, m in leaves]  # v may underflow


################################################################################
# Tensors
################################################################################


def are_finite(rule: Rule, stacks: list[Stack]) -> jax.Array:
    """Returns whether all gradients and params are finite; squares of params must be so, too.

    Compares extremes, which XLA finds without storing anything. The outputs of the networks are
    not checked. A theta that is not finite must show in the parameters, where meta-training sees
    it, and must not hide behind skipped steps.
    """
    if not stacks:
        return jnp.array(True)
    # As one reduction: XLA would repeat a chain of scalar operations in each loop that needs it.
    bounds = jnp.array([[[rule.largest], [_LARGEST_PARAM]]], jnp.float32)
    extremes = [
        [jnp.stack([jnp.min(x), jnp.max(x)]) for x in (stack.g, stack.tensor.p)] for stack in stacks
    ]
    return jnp.all(jnp.abs(jnp.asarray(extremes)) < bounds)  # NaN compares as False


def step_stacks(
    rule: Rule,
    step_fn: Callable[..., jax.Array],
    stacks: list[Stack],
    is_finite: jax.Array,
    per_tensor: Sequence[Any] = (),
) -> tuple[list[jax.Array], list[Stack]]:
    """Returns the steps of all tensors, and the stacks with new accumulators.

    Args:
      rule: the constants.
      step_fn: ``(tensor, g, *own) -> step`` of one tensor, from its new accumulators and its
        clipped gradient.
      stacks: the tensors.
      is_finite: bool ``[]``; if False, steps are zero and accumulators stay.
      per_tensor: arguments of `step_fn` that differ between tensors: trees of arrays
        ``[n_tensors, ...]``.
    """

    def move(tensor, g, *own):
        g = jnp.where(is_finite, jnp.clip(g, -rule.clip, rule.clip), 0.0)
        accumulated = features.accumulate(tensor, g, rule.decays)
        tensor = optax.tree.where(is_finite, accumulated, tensor)
        return jnp.where(is_finite, step_fn(tensor, g, *own), 0.0), tensor

    steps, moved = [], []
    for stack, rows in zip(stacks, row_numbers(stacks), strict=True):
        own = [_rows(tree, rows) for tree in per_tensor]
        # XLA on CPU is slower with a batch of one, and rounds in another way.
        move_all = jax.vmap(move) if len(rows) > 1 else _on_the_only(move)
        step, tensor = move_all(stack.tensor, stack.g, *own)
        steps.append(step)
        moved.append(stack._replace(tensor=tensor))
    return steps, moved


def _on_the_only(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap` of `fn` for a batch of one."""

    def call(*args):
        only = jax.tree.map(lambda x: jnp.squeeze(x, 0), args)
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), fn(*only))

    return call


def outputs(
    rule: Rule, layers: list[Layer], tensor: Tensor, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns two outputs of the network for each parameter, and the mean squares of its inputs.

    Args:
      rule: the constants.
      layers: w ``[in, out]`` and b ``[out]`` of each layer.
      tensor: the tensor, with accumulators that include `g`.
      g: its clipped gradient.
    """
    columns = lambda g, tensor: features.columns(
        g, tensor, v_eps=rule.v_eps, diag_eps=rule.diag_eps
    )
    mean_squares = features.mean_squares_of(columns(g, tensor), per_matrix=rule.per_matrix)
    # The columns are needed twice. Behind the barrier they are computed again, not stored.
    tensor, g = jax.lax.optimization_barrier((tensor, g))
    return *mlp(layers, mean_squares, columns(g, tensor), eps=rule.eps), mean_squares


def relative_step(
    layers: list[Layer], step_size: jax.Array | float, tensor: Tensor, g: jax.Array
) -> jax.Array:
    """Returns the step of VeLO and Celo for a tensor, in units of its root mean square.

    Args:
      layers: see `outputs`.
      step_size: of this tensor.
      tensor: see `outputs`.
      g: see `outputs`.
    """
    d, a, mean_squares = outputs(Rule(), layers, tensor, g)
    scale = jnp.sqrt(mean_squares[2] + 1e-9)  # group 2 is p
    return step_size * 0.001 * scale * d * jnp.exp(0.001 * a)
