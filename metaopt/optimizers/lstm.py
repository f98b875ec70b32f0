"""The coordinate-wise LSTM optimizer (L2O)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_fields, check_integer, check_number
from metaopt.core.meshes import with_auto_axes
from metaopt.core.trees import add_to_count, all_finite, check_float_tree, check_same_structure
from metaopt.core.types import LearnedOptimizer, transformation
from metaopt.optimizers.features import log_sign, warn_of_frozen_leaves


@dataclass(frozen=True, kw_only=True)
class LSTM:
    """LSTM: one small recurrent network steps every parameter on its own.

    Attributes:
      hidden: units per layer.
      layers: number of LSTM layers.
      p: gradients are read down to e^-p by their logarithm, smaller ones linearly.
      scale: factor on the output.
      warn_frozen: warn once of leaves whose gradient has been zero since the start.
    """

    name: ClassVar[str] = "lstm"
    hidden: int = 20
    layers: int = 2
    p: float = 10.0
    scale: float = 0.1
    warn_frozen: bool = True

    def __post_init__(self):
        check_fields(self)
        _check_settings("LSTM.", hidden=self.hidden, layers=self.layers, p=self.p, scale=self.scale)

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        return lstm(
            self.hidden,
            layers=self.layers,
            p=self.p,
            scale=self.scale,
            warn_frozen=self.warn_frozen,
        )


class LSTMState(NamedTuple):
    """State of the LSTM optimizer for m coordinates.

    Attributes:
      memory: one (c, h) pair per layer, each float32 ``[hidden, m]``.
      skipped: int32 ``[]``, number of steps skipped because the gradient was not finite.
      t: int32 ``[]``, number of steps so far, skipped ones included.
    """

    memory: tuple[tuple[jax.Array, jax.Array], ...]
    skipped: Int[Array, ""]
    t: Int[Array, ""]


def lstm(
    hidden: int = 20,
    *,
    layers: int = 2,
    p: float = 10.0,
    scale: float = 0.1,
    warn_frozen: bool = True,
) -> LearnedOptimizer:
    r"""Coordinate-wise LSTM: one small recurrent network steps every parameter on its own.

    .. math:: d_t, s_{t+1} = \mathrm{LSTM}(\mathrm{logsign}_p(g_t), s_t), \qquad
       x_{t+1} = x_t + \mathrm{scale} \cdot d_t

    where :math:`g_t` is the gradient of a coordinate, :math:`s_t` its memory and
    :math:`\mathrm{logsign}_p` the preprocessing `metaopt.optimizers.features.log_sign`. The
    output :math:`d_t` is the signed step, which is added. theta holds the network and the initial
    memory of every coordinate (one row, zero at first). `absorb` replaces the initial memory by
    the mean of the final memory over coordinates. The computation is in float32; updates have the
    dtype of each leaf.

    Args:
      hidden: units per layer.
      layers: number of LSTM layers.
      p: range of the log-sign preprocessing (10 in the paper, 5 in its released code).
      scale: factor on the output (0.1 in the paper for MNIST, 0.01 in its released code).
      warn_frozen: warn once of leaves whose gradient has been zero since the start, by a host
        callback in the compiled program. Use False to export or cache the program, which a
        callback prevents.

    Returns:
      A `LearnedOptimizer`. Its `update` needs neither params nor extra args. A step whose gradient
      is not finite is skipped and counted. The state holds ``2 * layers * hidden`` floats per
      parameter.

    Raises:
      ValueError: when an argument is out of range; at `apply`, when theta does not fit; at `init`,
        when a leaf is no real floating-point array; at `update`, when the gradients have another
        number of coordinates than the state.

    Examples:
      >>> learned = lstm(hidden=4, layers=1)
      >>> params = {"w": jnp.ones(3)}
      >>> tx = learned.apply(learned.init(jax.random.key(0), params))
      >>> tx.init(params).memory[0][0].shape  # [hidden, coordinates]
      (4, 3)

    References:
      Andrychowicz et al., [Learning to learn by gradient descent by gradient descent](
      https://arxiv.org/abs/1606.04474), sections 2 and 3 and appendix A

      Premont-Schwarz et al., [A Simple Guard for Learned Optimizers](
      https://arxiv.org/abs/2201.12426), section 4

      docs/optimizers/lstm.md lists where the sources disagree and what we chose.
    """
    _check_settings("lstm: ", hidden=hidden, layers=layers, p=p, scale=scale)
    net = CoordinateLSTM(hidden)

    def init(key, params):
        del params  # one network serves every coordinate of every task
        zeros = jnp.zeros((1, hidden))
        memory = tuple((zeros, zeros) for _ in range(layers))
        columns = jax.tree.map(jnp.transpose, memory)
        return {"net": net.init(key, jnp.zeros((2, 1)), columns)["params"], "memory": memory}

    @cache
    def theta_shapes():
        return jax.eval_shape(lambda: init(jax.random.key(0), None))

    def check_theta(theta):
        memory = theta.get("memory") if isinstance(theta, Mapping) else None
        num_layers = len(memory) if isinstance(memory, tuple | list) else 0
        if num_layers != layers:
            raise ValueError(
                f"lstm: theta has a memory of {num_layers} layers, but layers={layers}."
            )
        check_same_structure(f"lstm: theta, with hidden={hidden}", theta_shapes(), theta)

    def apply(theta, *, num_steps=None):
        del num_steps  # this optimizer does not know its horizon
        check_theta(theta)

        def init_fn(params):
            check_float_tree("lstm", params)
            m = optax.tree.size(params)
            memory = jax.tree.map(lambda c: jnp.repeat(c.T, m, axis=1), theta["memory"])
            zero = lambda: jnp.zeros([], jnp.int32)  # each is a buffer of its own
            return LSTMState(memory, skipped=zero(), t=zero())

        def update_fn(updates, state: LSTMState, params=None, **extra_args):
            del params, extra_args
            if warn_frozen:
                warn_of_frozen_leaves(
                    "lstm",
                    theta,
                    state.t,
                    state.skipped,
                    updates,
                    lambda: _are_frozen(updates, state.memory[0][0]),
                )
            return with_auto_axes(step_all, theta["net"], updates, state, like=(updates, state))

        def step_all(net_params, updates, state: LSTMState):
            grad, unravel = ravel_pytree(optax.tree.cast(updates, jnp.float32))  # [m]
            m = state.memory[0][0].shape[1]
            if len(grad) != m:
                raise ValueError(
                    f"lstm: got gradients of {len(grad)} parameters for the state of {m}; use the "
                    "state of init(params)."
                )
            inputs = log_sign(grad, p).T  # [2, m]
            step, memory = cast(Any, net.apply({"params": net_params}, inputs, state.memory))
            is_finite = all_finite(grad)
            step = jnp.where(is_finite, scale * step, 0.0)
            memory = optax.tree.where(is_finite, memory, state.memory)
            skipped = add_to_count(state.skipped, ~is_finite)
            return optax.tree.cast_like(unravel(step), updates), LSTMState(
                memory, skipped, add_to_count(state.t)
            )

        return transformation(init_fn, update_fn)

    def absorb(theta: Any, state: LSTMState):
        mean = jax.tree.map(lambda c: jnp.mean(c, axis=1, keepdims=True).T, state.memory)
        return {**theta, "memory": mean}

    return LearnedOptimizer(init, apply, absorb)


def _are_frozen(grads: Any, memory: Float[Array, "hidden m"]) -> list[jax.Array]:
    """Returns whether the gradients of each leaf have been zero in all steps (bool ``[]``).

    They are zero now, and coordinates that saw the same gradients have the same memory.
    """
    frozen, start = [], 0
    for grad in map(jnp.asarray, jax.tree.leaves(grads)):
        columns = memory[:, start : start + grad.size]
        start += grad.size
        if grad.size == 0:
            frozen.append(jnp.array(False))
            continue
        spread = jnp.max(jnp.max(columns, axis=1) - jnp.min(columns, axis=1))
        frozen.append(~jnp.any(grad) & (spread <= 1e-6))
    return frozen


def _check_settings(where: str, *, hidden: Any, layers: Any, p: Any, scale: Any) -> None:
    check_integer(f"{where}hidden", hidden, 1)
    check_integer(f"{where}layers", layers, 1)
    check_number(f"{where}p", p, above=0)
    check_number(f"{where}scale", scale)


class CoordinateLSTM(nn.Module):
    """Stacked LSTM cells (gates i, f, g, o; one bias each) and a linear read-out to one number.

    All weights start at U(-1/sqrt(hidden), 1/sqrt(hidden)), PyTorch's default.

    Attributes:
      hidden: units per layer.
    """

    hidden: int

    @nn.compact
    def __call__(self, x, memory):
        """Steps every coordinate.

        Args:
          x: inputs ``[2, m]``.
          memory: one (c, h) pair per layer, each ``[hidden, m]``.

        Returns:
          outputs ``[m]`` and the new memory.
        """
        init = _symmetric_uniform(self.hidden**-0.5)
        new_memory = []
        for layer, carry in enumerate(memory):
            carry = LSTMCell(self.hidden, init, name=f"lstm_{layer}")(x, carry)
            x = carry[1]
            new_memory.append(carry)
        kernel, bias = DenseParams(1, init, name="readout")(len(x))
        return kernel[:, 0] @ x + bias, tuple(new_memory)


class LSTMCell(nn.Module):
    """An LSTM cell on ``[in, m]`` whose parameters are named as in `nn.OptimizedLSTMCell`.

    The m coordinates come last because m is large: the gates are then whole rows, and the
    element-wise part of a step, which takes most of its time, runs over contiguous memory. All
    gates are one product of matrices, and sigmoids are computed as hyperbolic tangents, which
    saves time in back-propagation on CPU.

    Attributes:
      hidden: number of units.
      init: initializer of all parameters.
    """

    hidden: int
    init: Any

    @nn.compact
    def __call__(self, x, carry):
        """Steps the cell.

        Args:
          x: inputs ``[in, m]``.
          carry: c and h, each ``[hidden, m]``.

        Returns:
          The new c and h.
        """
        c, h = carry
        input_kernels, hidden_kernels, biases = [], [], []
        for gate in "ifgo":
            input_params = DenseParams(self.hidden, self.init, use_bias=False, name=f"i{gate}")
            input_kernel, _ = input_params(len(x))
            hidden_kernel, bias = DenseParams(self.hidden, self.init, name=f"h{gate}")(self.hidden)
            input_kernels.append(input_kernel)
            hidden_kernels.append(hidden_kernel)
            biases.append(bias)
        kernel = jnp.concatenate(
            [jnp.concatenate(input_kernels, axis=1), jnp.concatenate(hidden_kernels, axis=1)]
        )
        gates = kernel.T @ jnp.concatenate([x, h]) + jnp.concatenate(biases)[:, None]
        i, f, g, o = jnp.split(gates, 4)
        c = _sigmoid(f) * c + _sigmoid(i) * jnp.tanh(g)
        h = _sigmoid(o) * jnp.tanh(c)
        return c, h


class DenseParams(nn.Module):
    """The parameters of a dense layer, named as in `nn.Dense`.

    Attributes:
      units: number of outputs.
      init: initializer of the kernel and the bias.
      use_bias: whether there is a bias.
    """

    units: int
    init: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, num_inputs: int):
        """Returns the kernel ``[num_inputs, units]`` and the bias ``[units]`` or None."""
        kernel = self.param("kernel", self.init, (num_inputs, self.units))
        bias = self.param("bias", self.init, (self.units,)) if self.use_bias else None
        return kernel, bias


def _symmetric_uniform(bound: float):
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _sigmoid(x):
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)
