"""The coordinate-wise LSTM optimizer (L2O)."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from metaopt.base import LearnedOptimizer, transformation
from metaopt.optimizers.features import log_sign
from metaopt.trees import all_finite, check_float_tree


class LSTMState(NamedTuple):
    """State of the LSTM optimizer; m = number of coordinates.

    Attributes:
      memory: one (c, h) pair per layer, each ``[m, hidden]``.
      skipped: steps left out since the gradient was not finite, int32 [].
    """

    memory: tuple[tuple[jax.Array, jax.Array], ...]
    skipped: jax.Array


def _symmetric_uniform(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


class CoordinateLSTM(nn.Module):
    """Stacked LSTM cells (gates i, f, g, o; one bias each) and a linear read-out to one number.

    All weights start at U(-1/sqrt(hidden), 1/sqrt(hidden)), PyTorch's default.
    """

    hidden: int
    layers: int

    @nn.compact
    def __call__(self, x, memory):
        init = _symmetric_uniform(self.hidden**-0.5)
        new_memory = []
        for layer, carry in enumerate(memory):
            cell = nn.OptimizedLSTMCell(
                self.hidden,
                kernel_init=init,
                recurrent_kernel_init=init,
                bias_init=init,
                name=f"lstm_{layer}",
            )
            carry, x = cell(carry, x)
            new_memory.append(carry)
        step = nn.Dense(1, kernel_init=init, bias_init=init, name="readout")(x)
        return step[..., 0], tuple(new_memory)


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

    References: Andrychowicz et al. 2016, sections 2-3 and appendix A; LGL2O, section 4.
    """
    for name, value in {"hidden": hidden, "layers": layers}.items():
        if value < 1:
            raise ValueError(f"lstm: {name} must be at least 1, got {value}.")
    if p <= 0:
        raise ValueError(f"lstm: p must be positive, got {p}.")
    net = CoordinateLSTM(hidden, layers)

    def init(key, params):
        del params  # one network serves every coordinate of every task
        zeros = jnp.zeros((1, hidden))
        memory = tuple((zeros, zeros) for _ in range(layers))
        return {"net": net.init(key, jnp.zeros((1, 2)), memory)["params"], "memory": memory}

    def apply(theta, *, num_steps=None):
        del num_steps  # this optimizer does not know its horizon

        def init_fn(params):
            check_float_tree("lstm", params)
            m = optax.tree.size(params)
            memory = jax.tree.map(lambda c: jnp.repeat(c, m, axis=0), theta["memory"])
            return LSTMState(memory, skipped=jnp.zeros([], jnp.int32))

        def update_fn(updates, state: LSTMState, params=None, **extra_args):
            del params, extra_args
            grad, unravel = ravel_pytree(optax.tree.cast(updates, jnp.float32))  # [m]
            if len(grad) != len(state.memory[0][0]):
                raise ValueError(
                    f"lstm: got gradients of {len(grad)} parameters for the state of "
                    f"{len(state.memory[0][0])}; use the state of init(params) of the same params."
                )
            inputs = log_sign(grad, p)
            step, memory = cast(Any, net.apply({"params": theta["net"]}, inputs, state.memory))
            ok = all_finite(grad)
            step = jnp.where(ok, scale * step, 0.0)
            memory = optax.tree.where(ok, memory, state.memory)
            skipped = state.skipped + jnp.where(ok, 0, 1)
            return optax.tree.cast_like(unravel(step), updates), LSTMState(memory, skipped)

        return transformation(init_fn, update_fn)

    def absorb(theta: Any, state: LSTMState):
        mean = jax.tree.map(lambda c: jnp.mean(c, axis=0, keepdims=True), state.memory)
        return {**theta, "memory": mean}

    return LearnedOptimizer(init, apply, absorb)
