"""VeLO's networks: an LSTM over tensors, and the bank of per-parameter MLPs that it mixes."""

from typing import Any

import jax
import jax.numpy as jnp

from metaopt.core.types import Key, Theta
from metaopt.optimizers.velo_features import GROUP_SIZES, Columns
from metaopt.optimizers.velo_import import velo_shapes

_BANK_SCALE = 100.0  # on the mean over the bank
_EXP_SCALE = 0.001


def init_theta(key: Key, hidden: int, bank: int) -> Theta:
    """Weights truncated normal with standard deviation 1/sqrt(fan_in); biases and memory zero."""
    theta: dict[str, Any] = {}
    shapes = velo_shapes(hidden, bank)
    for name, k in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        *path, leaf = name
        shape = shapes[name]
        value = jnp.zeros(shape)
        if leaf.startswith("w"):
            fan_in = sum(GROUP_SIZES) if leaf.startswith("w0") else shape[-2]
            value = jax.random.truncated_normal(k, -2.0, 2.0, shape) * fan_in**-0.5
        branch = theta
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return theta


def _linear(layer, x):
    return jnp.matmul(x, layer["w"], precision="highest") + layer["b"]


def tensor_network(
    theta: Theta, x: jax.Array, hidden: jax.Array, cell: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step of the LSTM; rows are tensors, which meet only in the maximum.

    Args:
      theta: see `velo`; the leaf ``rnn_params/linear`` is not read.
      x: ``[n_tensors, 30]``.
      hidden, cell: ``[n_tensors, hidden]``.

    Returns:
      controls ``[n_tensors, bank]``, step sizes ``[n_tensors]``, new hidden and cell.
    """
    net = theta["rnn_params"]
    pool = jnp.max(jax.nn.relu(_linear(net["linear_1"], x)), axis=0, keepdims=True)
    x = _linear(net["linear_2"], x) + pool
    gates = _linear(net["rnn/linear"], jnp.concatenate([x, hidden], axis=1))
    i, g, f, o = jnp.split(gates, 4, axis=1)
    cell = jax.nn.sigmoid(f + 1.0) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    controls = _linear(net["rnn_to_controls"], hidden)
    return controls, _linear(net["step_size"], hidden)[:, 0], hidden, cell


def mix_bank(theta: Theta, controls: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """The three layers of each tensor's MLP: w ``[n_tensors, in, out]``, b ``[n_tensors, out]``."""
    bank = theta["ff_mod_stack"]["~"]
    first = jnp.concatenate([bank[f"w0__{k}"] for k in range(len(GROUP_SIZES))], axis=1)
    scale = _BANK_SCALE / controls.shape[1]

    def mix(stack):
        return scale * jnp.einsum("ti,i...->t...", controls, stack, precision="highest")

    weights = [first, bank["w1"], bank["w2"]]
    return [(mix(w), mix(bank[f"b{layer}"])) for layer, w in enumerate(weights)]


def _matrix_form(dense, of_row, of_col, layers):
    """The MLP with all dense columns stacked, ``[18, ...]``: few operations, much memory."""
    x, bias = jnp.stack(dense), of_row + of_col
    for w, b in layers:
        x = jnp.einsum("k...,ku->u...", x, w, precision="highest")
        x = x + bias + jnp.expand_dims(b, range(1, x.ndim))
        x, bias, outputs = jax.nn.relu(x), 0.0, x
    return outputs[0] * jnp.exp(_EXP_SCALE * outputs[1])


def _affine(inputs, w, b):
    for x, weight in zip(inputs, w, strict=True):
        b = b + weight * x
    return b


@jax.custom_jvp
def _unrolled(dense, of_row, of_col, layers):
    """The MLP unit by unit, scalar weights times whole tensors.

    Columns, layers and step become one loop over the tensor and no matrix is stored. Derivatives
    are those of the matrix form, whose transpose compiles many times faster.
    """
    (w0, b0), (w1, b1), (w2, b2) = layers
    x = [_affine(dense, w0[:, u], b0[u] + of_row[u] + of_col[u]) for u in range(b0.shape[0])]
    x = [_affine(map(jax.nn.relu, x), w1[:, u], b1[u]) for u in range(b1.shape[0])]
    d, a = (_affine(map(jax.nn.relu, x), w2[:, u], b2[u]) for u in range(2))
    return d * jnp.exp(_EXP_SCALE * a)


@_unrolled.defjvp
def _unrolled_jvp(primals, tangents):
    return jax.jvp(_matrix_form, primals, tangents)


def direction(
    layers: list[tuple[jax.Array, jax.Array]], mean_square: jax.Array, columns: Columns
) -> jax.Array:
    """One tensor's MLP on its normalised columns: ``d * exp(0.001 a)`` for each parameter.

    Args:
      layers: (w, b) of each layer, w ``[in, out]``, from `mix_bank`.
      mean_square: ``[30]``, of the columns as `in_group_order` puts them.
      columns: the inputs. Those of rows and of columns of the tensor go through a matrix product
        at their own size, and only its result is broadcast.
    """
    (w0, b0), *rest = layers
    w0 = w0 * jax.lax.rsqrt(1e-5 + mean_square)[:, None]
    dense = jnp.concatenate([w0[:15], w0[27:]])
    row = jnp.concatenate([w0[15:18], w0[21:24]])
    col = jnp.concatenate([w0[18:21], w0[24:27]])
    of_row = jnp.einsum("k...,ku->u...", columns.row, row, precision="highest")
    of_col = jnp.einsum("k...,ku->u...", columns.col, col, precision="highest")
    return _unrolled(columns.dense, of_row, of_col, [(dense, b0), *rest])
