"""The coordinate-wise LSTM optimizer (L2O)."""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int

from metaopt.core.checks import check_integer, check_number
from metaopt.core.trees import all_finite, check_float_tree, check_same_structure
from metaopt.core.types import LearnedOptimizer, transformation
from metaopt.optimizers.features import log_sign


class LSTMState(NamedTuple):
    """State of the LSTM optimizer; m = number of coordinates.

    Attributes:
      memory: one (c, h) pair per layer, each ``[hidden, m]``.
      skipped: steps left out since the gradient was not finite, int32 [].
    """

    memory: tuple[tuple[jax.Array, jax.Array], ...]
    skipped: Int[Array, ""]


def _symmetric_uniform(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class Dense(nn.Module):
    """The parameters of a dense layer, named as in `nn.Dense`; kernel ``[in, units]``."""

    units: int
    init: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: int):
        kernel = self.param("kernel", self.init, (inputs, self.units))
        bias = self.param("bias", self.init, (self.units,)) if self.use_bias else None
        return kernel, bias


class LSTMCell(nn.Module):
    """An LSTM cell on ``[in, m]``, its parameters named as in `nn.OptimizedLSTMCell`.

    Coordinates come last since m is large: gates are then whole rows, and the element-wise part of
    a step, most of its time, runs over contiguous memory. All gates are one product of matrices,
    and sigmoids are hyperbolic tangents: on CPU that is a fifth of the time of back-propagation.
    """

    hidden: int
    init: Any

    @nn.compact
    def __call__(self, x, carry):
        c, h = carry
        of_x, of_h, biases = [], [], []
        for gate in "ifgo":
            of_x.append(Dense(self.hidden, self.init, use_bias=False, name=f"i{gate}")(len(x))[0])
            kernel, bias = Dense(self.hidden, self.init, name=f"h{gate}")(self.hidden)
            of_h.append(kernel)
            biases.append(bias)
        kernel = jnp.concatenate([jnp.concatenate(of_x, 1), jnp.concatenate(of_h, 1)])
        gates = kernel.T @ jnp.concatenate([x, h]) + jnp.concatenate(biases)[:, None]
        i, f, g, o = jnp.split(gates, 4)
        c = _sigmoid(f) * c + _sigmoid(i) * jnp.tanh(g)
        h = _sigmoid(o) * jnp.tanh(c)
        return c, h


def _sigmoid(x):
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)


class CoordinateLSTM(nn.Module):
    """Stacked LSTM cells (gates i, f, g, o; one bias each) and a linear read-out to one number.

    All weights start at U(-1/sqrt(hidden), 1/sqrt(hidden)), PyTorch's default.
    """

    hidden: int

    @nn.compact
    def __call__(self, x, memory):
        init = _symmetric_uniform(self.hidden**-0.5)
        new_memory = []
        for layer, carry in enumerate(memory):
            carry = LSTMCell(self.hidden, init, name=f"lstm_{layer}")(x, carry)
            x = carry[1]
            new_memory.append(carry)
        kernel, bias = Dense(1, init, name="readout")(len(x))
        return kernel[:, 0] @ x + bias, tuple(new_memory)


def lstm(
    hidden: int = 20, *, layers: int = 2, p: float = 10.0, scale: float = 0.1
) -> LearnedOptimizer:
    r"""Coordinate-wise LSTM: one small recurrent network steps every parameter on its own.

    .. math:: d_t, s_{t+1} = \mathrm{LSTM}(\mathrm{logsign}_p(g_t), s_t), \qquad
       x_{t+1} = x_t + \mathrm{scale} \cdot d_t

    The output is the signed step and is added. theta holds the network and the initial memory
    (one row, zero at the start), which every coordinate begins with; `absorb` writes the mean
    over coordinates back. Computes in float32 and returns each leaf's own dtype.

    Args:
      hidden: units per layer.
      layers: number of LSTM layers.
      p: range of the log-sign preprocessing (10 in the paper, 5 in its released code).
      scale: factor on the output (0.1 in the paper for MNIST, 0.01 in its released code).

    Returns:
      A `LearnedOptimizer`. `update` needs neither params nor extra args; a step with a non-finite
      gradient changes nothing but a counter. Its state holds ``2 * layers * hidden`` floats per
      parameter.

    Examples:
      >>> learned = lstm(hidden=4, layers=1)
      >>> params = {"w": jnp.ones(3)}
      >>> tx = learned.apply(learned.init(jax.random.key(0), params))
      >>> tx.init(params).memory[0][0].shape  # [hidden, coordinates]
      (4, 3)

    References: Andrychowicz et al. 2016, sections 2-3 and appendix A; LGL2O, section 4.
    """
    for name, value in {"hidden": hidden, "layers": layers}.items():
        check_integer(f"lstm: {name}", value, 1)
    check_number("lstm: p", p, above=0)
    check_number("lstm: scale", scale)
    net = CoordinateLSTM(hidden)

    def init(key, params):
        del params  # one network serves every coordinate of every task
        zeros = jnp.zeros((1, hidden))
        memory = tuple((zeros, zeros) for _ in range(layers))
        columns = jax.tree.map(jnp.transpose, memory)
        return {"net": net.init(key, jnp.zeros((2, 1)), columns)["params"], "memory": memory}

    @cache
    def expected():
        return jax.eval_shape(lambda: init(jax.random.key(0), None))

    def check_theta(theta):
        memory = theta.get("memory") if isinstance(theta, Mapping) else None
        found = len(memory) if isinstance(memory, tuple | list) else 0
        if found != layers:
            raise ValueError(f"lstm: theta has a memory of {found} layers, but layers={layers}.")
        check_same_structure(f"lstm: theta, with hidden={hidden}", expected(), theta)

    def apply(theta, *, num_steps=None):
        del num_steps  # this optimizer does not know its horizon
        check_theta(theta)

        def init_fn(params):
            check_float_tree("lstm", params)
            m = optax.tree.size(params)
            memory = jax.tree.map(lambda c: jnp.repeat(c.T, m, axis=1), theta["memory"])
            return LSTMState(memory, skipped=jnp.zeros([], jnp.int32))

        def update_fn(updates, state: LSTMState, params=None, **extra_args):
            del params, extra_args
            grad, unravel = ravel_pytree(optax.tree.cast(updates, jnp.float32))  # [m]
            if len(grad) != state.memory[0][0].shape[1]:
                raise ValueError(
                    f"lstm: got gradients of {len(grad)} parameters for the state of "
                    f"{state.memory[0][0].shape[1]}; use the state of init(params)."
                )
            inputs = log_sign(grad, p).T  # [2, m]
            step, memory = cast(Any, net.apply({"params": theta["net"]}, inputs, state.memory))
            ok = all_finite(grad)
            step = jnp.where(ok, scale * step, 0.0)
            memory = optax.tree.where(ok, memory, state.memory)
            skipped = state.skipped + jnp.where(ok, 0, 1)
            return optax.tree.cast_like(unravel(step), updates), LSTMState(memory, skipped)

        return transformation(init_fn, update_fn)

    def absorb(theta: Any, state: LSTMState):
        mean = jax.tree.map(lambda c: jnp.mean(c, axis=1, keepdims=True).T, state.memory)
        return {**theta, "memory": mean}

    return LearnedOptimizer(init, apply, absorb)
