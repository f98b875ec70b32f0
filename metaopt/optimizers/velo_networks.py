"""VeLO's networks: an LSTM over tensors, and a bank of per-parameter MLPs that it mixes.

theta is a nest of dicts, named as in the published files; see `metaopt.optimizers.layouts`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from metaopt.core.types import Theta
from metaopt.optimizers.velo_features import GROUP_SIZES, Columns

Layer = tuple[jax.Array, jax.Array]  # w [..., in, out] and b [..., out]

################################################################################
# Per-tensor network
################################################################################


def lstm_step(
    theta: Theta, x: jax.Array, hidden: jax.Array, cell: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Takes one step of the LSTM. Its rows are tensors, which meet in a maximum only.

    Args:
      theta: see `velo`; the leaf ``rnn_params/linear`` is not read.
      x: inputs ``[n_tensors, features]``.
      hidden: ``[n_tensors, hidden]``.
      cell: ``[n_tensors, hidden]``.

    Returns:
      The new hidden and cell.
    """
    net = theta["rnn_params"]
    pool = jnp.max(jax.nn.relu(_linear(net["linear_1"], x)), axis=0, keepdims=True)
    x = _linear(net["linear_2"], x) + pool
    gates = _linear(net["rnn/linear"], jnp.concatenate([x, hidden], axis=1))
    i, g, f, o = jnp.split(gates, 4, axis=1)
    cell = jax.nn.sigmoid(f + 1.0) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


def controls_of(theta: Theta, hidden: jax.Array) -> jax.Array:
    """Returns the weights of the bank ``[n_tensors, bank]`` from the LSTM's hidden state."""
    return _linear(theta["rnn_params"]["rnn_to_controls"], hidden)


def step_sizes_of(theta: Theta, hidden: jax.Array) -> jax.Array:
    """Returns the last layer's number for each tensor ``[n_tensors]`` from the hidden state."""
    return _linear(theta["rnn_params"]["step_size"], hidden)[:, 0]


def absorb_memory(theta: Any, state: Any) -> Theta:
    """Returns theta whose initial memory is the mean over tensors of the memory in `state`."""
    if state.hidden.shape[0] == 0:
        return theta
    memory = {"hidden": state.hidden, "cell": state.cell}
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0, keepdims=True), memory)
    return {**theta, "lstm_init_state": mean}


def _linear(layer, x):
    return jnp.matmul(x, layer["w"], precision="highest") + layer["b"][None]


################################################################################
# Per-parameter network
################################################################################


def mix_bank(theta: Theta, controls: jax.Array) -> list[Layer]:
    """Mixes the networks of the bank into one MLP per tensor: the mean of controls * networks.

    Args:
      theta: see `velo`.
      controls: weights of the mixture ``[n_tensors, bank]``.

    Returns:
      The three layers, each w ``[n_tensors, in, out]`` and b ``[n_tensors, out]``.
    """
    scale = 1 / controls.shape[1]

    def mix(stack):
        return scale * jnp.einsum("ti,i...->t...", controls, stack, precision="highest")

    return [(mix(w), mix(b)) for w, b in mlp_layers(theta)]


def mlp_layers(theta: Theta) -> list[Layer]:
    """Returns the layers of the bank, or of the one network of a theta without a bank.

    Args:
      theta: with the leaves ``ff_mod_stack/~/...``.

    Returns:
      The three layers, each w ``[..., in, out]`` and b ``[..., out]``.
    """
    bank = theta["ff_mod_stack"]["~"]
    groups = range(len(GROUP_SIZES))
    first = jnp.concatenate([bank[f"w0__{group}"] for group in groups], axis=-2)
    weights = [first, bank["w1"], bank["w2"]]
    return [(w, bank[f"b{layer}"]) for layer, w in enumerate(weights)]


def mlp(
    layers: list[Layer], mean_square: jax.Array, columns: Columns, *, eps: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Applies the MLP of one tensor to its normalised columns.

    Args:
      layers: w ``[in, out]`` and b ``[out]`` of each layer.
      mean_square: ``[30, ...]``, mean squares of the columns, from `mean_squares_of`.
      columns: the inputs. Those of the tensor's rows and columns are multiplied at their own
        size, and only the product is broadcast.
      eps: is added to the mean squares.

    Returns:
      The first two outputs d and a for each parameter.
    """
    (w0, b0), *rest = layers
    scale = jnp.expand_dims(jax.lax.rsqrt(eps + mean_square), 1)
    w0 = scale * jnp.expand_dims(w0, range(2, scale.ndim))  # [30, units, ...]
    # The inverse of `in_group_order`.
    dense = jnp.concatenate([w0[:15], w0[27:]])
    row = jnp.concatenate([w0[15:18], w0[21:24]])
    col = jnp.concatenate([w0[18:21], w0[24:27]])
    of_row = jnp.einsum("k...,ku...->u...", columns.row, row, precision="highest")
    of_col = jnp.einsum("k...,ku...->u...", columns.col, col, precision="highest")
    return _unrolled_mlp(columns.dense, of_row, of_col, [(dense, b0), *rest])


@jax.custom_jvp
def _unrolled_mlp(dense, of_row, of_col, layers):
    """Computes the MLP unit by unit, as scalar weights times whole tensors.

    The columns, the layers and the step become one loop over the tensor, and no matrix is stored.
    Derivatives are those of `_matrix_mlp`, whose transpose compiles many times faster.
    """
    (w0, b0), (w1, b1), (w2, b2) = layers
    x = [_affine(dense, w0[:, u], b0[u] + of_row[u] + of_col[u]) for u in range(b0.shape[0])]
    x = [_affine(map(jax.nn.relu, x), w1[:, u], b1[u]) for u in range(b1.shape[0])]
    d, a = (_affine(map(jax.nn.relu, x), w2[:, u], b2[u]) for u in range(2))
    return d, a


@_unrolled_mlp.defjvp
def _unrolled_mlp_jvp(primals, tangents):
    return jax.jvp(_matrix_mlp, primals, tangents)


def _affine(inputs, w, b):
    for x, weight in zip(inputs, w, strict=True):
        b = b + weight * x
    return b


def _matrix_mlp(dense, of_row, of_col, layers):
    """Computes the MLP on stacked dense columns ``[18, ...]``: few operations, much memory."""
    x, bias = jnp.stack(dense), of_row + of_col
    for w, b in layers:
        x = jnp.einsum("k...,ku...->u...", x, w, precision="highest")
        x = x + bias + jnp.expand_dims(b, range(1, x.ndim))
        x, bias, outputs = jax.nn.relu(x), 0.0, x
    return outputs[0], outputs[1]
