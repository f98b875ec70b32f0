"""VeLO's networks: an LSTM over tensors, and a bank of per-parameter MLPs that it mixes.

theta is a nest of dicts, named as in the published files; `theta_shapes` has the names and shapes.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from metaopt.core.types import Key, Theta
from metaopt.optimizers.velo_features import GROUP_SIZES, NUM_FEATURES, Columns

_BANK_SCALE = 100.0  # on the mean over the bank
_EXP_SCALE = 0.001

Path = tuple[str, ...]
Layer = tuple[jax.Array, jax.Array]  # w [..., in, out] and b [..., out]

################################################################################
# Meta-parameters
################################################################################


def theta_shapes(hidden: int, bank: int) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of every leaf of theta by its path.

    Args:
      hidden: units of the LSTM.
      bank: number of networks in the bank.
    """
    shapes: dict[Path, tuple[int, ...]] = {
        ("lstm_init_state", "hidden"): (1, hidden),
        ("lstm_init_state", "cell"): (1, hidden),
    }
    linear = {
        "linear": (NUM_FEATURES, hidden),  # not used, but part of the published files
        "linear_1": (NUM_FEATURES, hidden),
        "linear_2": (NUM_FEATURES, hidden),
        "rnn/linear": (2 * hidden, 4 * hidden),  # one name, not a path of two
        "rnn_to_controls": (hidden, bank),
        "step_size": (hidden, 1),
    }
    for name, (num_inputs, num_outputs) in linear.items():
        shapes["rnn_params", name, "w"] = (num_inputs, num_outputs)
        shapes["rnn_params", name, "b"] = (num_outputs,)
    for group, size in enumerate(GROUP_SIZES):
        shapes["ff_mod_stack", "~", f"w0__{group}"] = (bank, size, 4)
    for name, shape in {"w1": (4, 4), "w2": (4, 3), "b0": (4,), "b1": (4,), "b2": (3,)}.items():
        shapes["ff_mod_stack", "~", name] = (bank, *shape)
    return shapes


def init_theta(key: Key, hidden: int, bank: int) -> Theta:
    """Returns random meta-parameters.

    Weights are truncated normal with standard deviation 1/sqrt(fan_in). Biases and the initial
    memory are zero.

    Args:
      key: random key.
      hidden: units of the LSTM.
      bank: number of networks in the bank.
    """
    shapes = theta_shapes(hidden, bank)
    leaves = {}
    for path, k in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        name, shape = path[-1], shapes[path]
        leaves[path] = jnp.zeros(shape)
        if name.startswith("w"):
            fan_in = sum(GROUP_SIZES) if name.startswith("w0") else shape[-2]
            leaves[path] = jax.random.truncated_normal(k, -2.0, 2.0, shape) * fan_in**-0.5
    return unflatten_dict(leaves)


################################################################################
# Per-tensor network
################################################################################


def tensor_network(
    theta: Theta, x: jax.Array, hidden: jax.Array, cell: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes one step of the LSTM. Its rows are tensors, which meet in a maximum only.

    Args:
      theta: see `velo`; the leaf ``rnn_params/linear`` is not read.
      x: inputs ``[n_tensors, 30]``.
      hidden: ``[n_tensors, hidden]``.
      cell: ``[n_tensors, hidden]``.

    Returns:
      The controls ``[n_tensors, bank]``, the step sizes ``[n_tensors]``, the new hidden and cell.
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


def _linear(layer, x):
    return jnp.matmul(x, layer["w"], precision="highest") + layer["b"]


################################################################################
# Per-parameter network
################################################################################


def mix_bank(theta: Theta, controls: jax.Array) -> list[Layer]:
    """Mixes the networks of the bank into one MLP per tensor.

    Args:
      theta: see `velo`.
      controls: weights of the mixture ``[n_tensors, bank]``.

    Returns:
      The three layers, each w ``[n_tensors, in, out]`` and b ``[n_tensors, out]``.
    """
    bank = theta["ff_mod_stack"]["~"]
    groups = range(len(GROUP_SIZES))
    first = jnp.concatenate([bank[f"w0__{group}"] for group in groups], axis=1)
    scale = _BANK_SCALE / controls.shape[1]

    def mix(stack):
        return scale * jnp.einsum("ti,i...->t...", controls, stack, precision="highest")

    weights = [first, bank["w1"], bank["w2"]]
    return [(mix(w), mix(bank[f"b{layer}"])) for layer, w in enumerate(weights)]


def direction(layers: list[Layer], mean_square: jax.Array, columns: Columns) -> jax.Array:
    """Applies the MLP of one tensor to its normalised columns.

    Args:
      layers: w ``[in, out]`` and b ``[out]`` of each layer, from `mix_bank`.
      mean_square: ``[30]``, mean squares of the columns, from `mean_squares_of`.
      columns: the inputs. Those of the tensor's rows and columns are multiplied at their own
        size, and only the product is broadcast.

    Returns:
      ``d * exp(0.001 a)`` for each parameter, where d and a are the first two outputs.
    """
    (w0, b0), *rest = layers
    w0 = w0 * jax.lax.rsqrt(1e-5 + mean_square)[:, None]
    # The inverse of `in_group_order`.
    dense = jnp.concatenate([w0[:15], w0[27:]])
    row = jnp.concatenate([w0[15:18], w0[21:24]])
    col = jnp.concatenate([w0[18:21], w0[24:27]])
    of_row = jnp.einsum("k...,ku->u...", columns.row, row, precision="highest")
    of_col = jnp.einsum("k...,ku->u...", columns.col, col, precision="highest")
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
    return d * jnp.exp(_EXP_SCALE * a)


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
        x = jnp.einsum("k...,ku->u...", x, w, precision="highest")
        x = x + bias + jnp.expand_dims(b, range(1, x.ndim))
        x, bias, outputs = jax.nn.relu(x), 0.0, x
    return outputs[0] * jnp.exp(_EXP_SCALE * outputs[1])
