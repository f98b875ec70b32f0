"""The rule that VeLO, Celo, Celo2 and the adafac MLP share: a small network steps each parameter.

Each tensor of the params has accumulators. From them and the gradient come 30 columns, the inputs
of the network (`velo_features`, `velo_networks`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metaopt.core.trees import check_float_tree, check_same_structure
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


def flatten(
    name: str, updates: Any, state: Any, params: Params
) -> tuple[list[Tensor], list[jax.Array]]:
    """Returns the tensors and the gradients of the leaves of params, in float32.

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
    momenta = zip(*[treedef.flatten_up_to(tree) for tree in state.momenta], strict=True)
    v = treedef.flatten_up_to(state.v)
    factored = map(_as_factored, treedef.flatten_up_to(state.factored))
    tensors = [Tensor(*fields) for fields in zip(leaves, momenta, v, factored, strict=True)]
    return tensors, [g.astype(jnp.float32) for g in treedef.flatten_up_to(updates)]


def _as_factored(node: Any) -> features.Factored:
    """A `Factored`, which `flax.nnx.Optimizer` keeps as a mapping of its fields."""
    if isinstance(node, features.Factored):
        return node
    return features.Factored(row=node["row"], col=node.get("col"))


def unflatten(
    steps: list[jax.Array], tensors: list[Tensor], updates: Any, state: Any, params: Params
) -> tuple[Any, Any]:
    """Returns the tree of steps, with the dtypes of `updates`, and the state with new accumulators.

    Args:
      steps: what is added to each leaf of params.
      tensors: their new accumulators.
      updates: gradients.
      state: the state that `flatten` read.
      params: the tree.
    """
    treedef = jax.tree.structure(params)
    grads = treedef.flatten_up_to(updates)
    deltas = [step.astype(g.dtype) for step, g in zip(steps, grads, strict=True)]
    momenta = zip(*[tensor.momenta for tensor in tensors], strict=True)
    return treedef.unflatten(deltas), state._replace(
        momenta=tuple(treedef.unflatten(leaves) for leaves in momenta) or state.momenta,
        v=treedef.unflatten([tensor.v for tensor in tensors]),
        factored=treedef.unflatten([tensor.factored for tensor in tensors]),
    )


def are_frozen(state: Any) -> list[jax.Array]:
    """Returns whether all gradients so far of each leaf have been zero (bool ``[]``)."""
    leaves = zip(jax.tree.leaves(state.v), jax.tree.leaves(state.momenta[-1]), strict=True)
    return [(v.size > 0) & ~(jnp.any(v) | jnp.any(m)) for v, m in leaves]  # v may underflow


################################################################################
# Tensors
################################################################################


def are_finite(rule: Rule, tensors: list[Tensor], grads: list[jax.Array]) -> jax.Array:
    """Returns whether all gradients and params are finite; squares of params must be so, too.

    Compares extremes, which XLA finds without storing anything. The outputs of the networks are
    not checked. A theta that is not finite must show in the parameters, where meta-training sees
    it, and must not hide behind skipped steps.
    """
    bounds = [(g, rule.largest) for g in grads] + [(tensor.p, _LARGEST_PARAM) for tensor in tensors]
    is_finite = jnp.array(True)
    for x, bound in bounds:
        if x.size:  # NaN compares as False
            is_finite &= (jnp.min(x) > -bound) & (jnp.max(x) < bound)
    return is_finite


def step_tensors(
    rule: Rule,
    step_fn: Callable[[int, Tensor, jax.Array], jax.Array],
    tensors: list[Tensor],
    grads: list[jax.Array],
    is_finite: jax.Array,
) -> tuple[list[jax.Array], list[Tensor]]:
    """Returns the steps of all tensors, and the tensors with their new accumulators.

    Args:
      rule: the constants.
      step_fn: ``(row, tensor, g) -> step`` from the new accumulators and the clipped gradient.
        `row` counts the tensors that have elements; others have no step.
      tensors: the tensors.
      grads: gradient of each tensor.
      is_finite: bool ``[]``; if False, steps are zero and accumulators stay.
    """
    steps, moved, row = [], [], 0
    for tensor, g in zip(tensors, grads, strict=True):
        if g.size == 0:
            steps.append(g)
            moved.append(tensor)
            continue
        g = jnp.where(is_finite, jnp.clip(g, -rule.clip, rule.clip), 0.0)
        accumulated = features.accumulate(tensor, g, rule.decays)
        tensor = optax.tree.where(is_finite, accumulated, tensor)
        steps.append(jnp.where(is_finite, step_fn(row, tensor, g), 0.0))
        moved.append(tensor)
        row += 1
    return steps, moved


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
