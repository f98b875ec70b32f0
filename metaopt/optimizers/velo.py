"""The VeLO-style hypernetwork optimizer: an LSTM per tensor writes an MLP for each parameter."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_fields, check_integer
from metaopt.core.trees import add_to_count
from metaopt.core.types import LearnedOptimizer, Theta, transformation
from metaopt.optimizers import velo_features as features
from metaopt.optimizers import velo_rule as rule
from metaopt.optimizers.features import (
    check_num_steps,
    check_params,
    check_value,
    warn_at_horizon,
    warn_of_frozen_leaves,
)
from metaopt.optimizers.layouts import check_theta, init_theta, velo_shapes
from metaopt.optimizers.velo_networks import (
    absorb_memory,
    controls_of,
    lstm_step,
    mix_bank,
    step_sizes_of,
)

_BANK_SCALE = 100.0  # on the mean over the bank


@dataclass(frozen=True, kw_only=True)
class VeLO:
    """VeLO: an LSTM per tensor writes a small network that steps each of its parameters.

    Attributes:
      hidden: units of the LSTM.
      bank: number of parameter sets that the LSTM mixes.
      warn_past_horizon: warn when a run goes past its horizon.
    """

    name: ClassVar[str] = "velo"
    hidden: int = 512
    bank: int = 256
    warn_past_horizon: bool = True

    def __post_init__(self):
        check_fields(self)
        _check_settings("VeLO.", hidden=self.hidden, bank=self.bank)

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        return velo(self.hidden, self.bank, warn_past_horizon=self.warn_past_horizon)


class VeloState(NamedTuple):
    """State of the VeLO optimizer, float32 unless said otherwise.

    "Like params" means a tree with the structure of params.

    Attributes:
      t: int32 ``[]``, number of updates so far, skipped ones included.
      skipped: int32 ``[]``, number of updates skipped because an input was not finite.
      loss: running means of the loss.
      hidden: memory of the per-tensor LSTM ``[n_tensors, hidden]``. Its rows are in the order of
        `jax.tree.leaves(params)`, without tensors that have no elements.
      cell: memory of the per-tensor LSTM ``[n_tensors, hidden]``.
      momenta: mean gradients for the decays (0.9, 0.99, 0.999), each like params.
      v: mean squared gradient, like params.
      factored: like params, with a `velo_features.Factored` in place of each leaf.
    """

    t: Int[Array, ""]
    skipped: Int[Array, ""]
    loss: features.LossBuffer
    hidden: Float[Array, "n_tensors hidden"]
    cell: Float[Array, "n_tensors hidden"]
    momenta: tuple[Any, ...]
    v: Any
    factored: Any


def velo(hidden: int = 512, bank: int = 256, *, warn_past_horizon: bool = True) -> LearnedOptimizer:
    r"""VeLO-style hypernetwork: a per-tensor LSTM writes a small MLP that steps each parameter.

    .. math:: c, \lambda, s_{t+1} = \mathrm{LSTM}(\phi_t, s_t), \qquad
       W = \frac{100}{N} \sum_{i=1}^{N} c_i \Theta_i, \qquad (d, a) = \mathrm{MLP}_W(z_t)

    .. math:: x_{t+1} = x_t - 10^{-3} \, \lambda \, \sqrt{\overline{x_t^2} + 10^{-9}} \;
       d \, e^{a / 1000}

    where :math:`\phi` are 30 numbers per tensor (time, loss, accumulators, rank), :math:`s` is
    the memory of the LSTM, :math:`z` are 30 numbers per parameter (gradient, parameter, momenta,
    second moments), :math:`\Theta` is a bank of N networks 30-4-4-3, and a bar is the mean over a
    tensor.

    The computation is in float32; updates have the dtype of each gradient leaf. After the horizon
    `num_steps` the features of time stay at the last planned step. An update whose loss, gradient
    or parameters are not finite changes neither parameters nor memory; ``state.skipped`` counts it,
    and so does ``state.t``. `absorb` replaces theta's initial memory by the mean of the LSTM's
    memory over tensors.

    Args:
      hidden: units of the LSTM, for `init`; `apply` reads the size from theta.
      bank: N, for `init`; `apply` reads the size from theta.
      warn_past_horizon: warn when a run goes past its horizon, and once of leaves whose gradient
        has been zero since the start, by host callbacks in the compiled program. Use False to
        export or cache the program, which a callback prevents.

    Returns:
      A `LearnedOptimizer`. Its `apply` needs `num_steps`. Its `update` needs `params` and the
      loss as the extra arg `value`, and ignores other extra args. The state holds about 4 floats
      per parameter.

    Raises:
      ValueError: when a size is below 1; at `apply`, when `num_steps` is missing, no integer or
        below 1 (a traced one is not checked), or theta is of another optimizer; at `update`, when
        `params` or `value` is missing or trees do not fit.

    References:
      Metz et al., [VeLO: Training Versatile Learned Optimizers by Scaling Up](
      https://arxiv.org/abs/2211.09760), 2022

      docs/optimizers/velo.md has every formula, and lists what differs from the published code.
    """
    _check_settings("velo: ", hidden=hidden, bank=bank)

    def init(key, params):
        del params  # one theta serves trees of any structure
        return init_theta(key, velo_shapes(hidden, bank))

    def apply(theta, *, num_steps=None):
        check_num_steps("velo", num_steps)
        check_theta("velo", theta)
        weights = optax.tree.cast(theta, jnp.float32)

        def init_fn(params):
            return _init_state(weights, params)

        def update_fn(updates, state: VeloState, params=None, *, value=None, **extra_args):
            del extra_args
            check_params("velo", params)
            check_value("velo", value)
            horizon = jnp.asarray(num_steps, jnp.int32)
            if warn_past_horizon:
                warn_at_horizon("velo", state.t, horizon)
                warn_of_frozen_leaves(
                    "velo",
                    theta,
                    state.t,
                    state.skipped,
                    params,
                    lambda: rule.are_frozen(state),
                )
            return _update(weights, horizon, updates, state, params, value)

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(init, apply, absorb_memory)


def _check_settings(where: str, *, hidden: Any, bank: Any) -> None:
    check_integer(f"{where}hidden", hidden, 1)
    check_integer(f"{where}bank", bank, 1)


def _init_state(theta: Theta, params: Any) -> VeloState:
    accumulators = rule.init_accumulators("velo", params)
    num_tensors = sum(p.size > 0 for p in jax.tree.leaves(accumulators["v"]))
    memory = theta["lstm_init_state"]
    return VeloState(
        t=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        loss=features.init_loss_buffer(),
        hidden=jnp.repeat(memory["hidden"], num_tensors, axis=0),
        cell=jnp.repeat(memory["cell"], num_tensors, axis=0),
        **accumulators,
    )


def _update(
    theta: Theta, num_steps: jax.Array, updates: Any, state: VeloState, params: Any, value: Any
) -> tuple[Any, VeloState]:
    """Returns the updates and the new state."""
    stacks = rule.stack("velo", updates, state, params)
    if not stacks:
        return updates, state._replace(t=add_to_count(state.t))

    # The per-tensor network, from the accumulators before this update.
    value = jnp.asarray(value, jnp.float32)
    loss, shared = features.progress_features(state.loss, value, state.t, num_steps)
    inputs, inputs_are_finite = _tensor_inputs(stacks, shared)
    is_finite = inputs_are_finite & jnp.isfinite(value)
    hidden, cell = lstm_step(theta, inputs, state.hidden, state.cell)
    layers = mix_bank(theta, _BANK_SCALE * controls_of(theta, hidden))
    # The barrier keeps these small results from being computed again inside each loop below.
    is_finite, layers, step_sizes = jax.lax.optimization_barrier(
        (is_finite, layers, step_sizes_of(theta, hidden))
    )

    # The per-parameter networks.
    def step_fn(tensor, g, layers, step_size):
        return -rule.relative_step(layers, step_size, tensor, g)

    steps, stacks = rule.step_stacks(
        rule.Rule(), step_fn, stacks, is_finite, per_tensor=(layers, step_sizes)
    )
    deltas, state = rule.unstack(steps, stacks, updates, state, params)
    memory = optax.tree.where(
        is_finite, (loss, hidden, cell), (state.loss, state.hidden, state.cell)
    )
    return deltas, state._replace(
        t=add_to_count(state.t),
        skipped=add_to_count(state.skipped, ~is_finite),
        loss=memory[0],
        hidden=memory[1],
        cell=memory[2],
    )


def _tensor_inputs(
    stacks: list[rule.Stack], shared: Float[Array, " shared"]
) -> tuple[jax.Array, jax.Array]:
    """Returns the inputs of the per-tensor network, and whether all that they rest on is finite.

    The outputs of the networks are not checked. A theta that is not finite must show in the
    parameters, where meta-training sees it, and must not hide behind skipped steps.

    Args:
      stacks: the tensors.
      shared: features of time and of the loss, ``[18]``.

    Returns:
      The inputs ``[n_tensors, 30]``, and a bool ``[]``.
    """
    statistics = rule.rows_of(
        stacks, [jax.vmap(features.tensor_statistics)(stack.tensor) for stack in stacks]
    )
    largest = jnp.stack([jnp.max(jnp.abs(stack.g)) for stack in stacks])
    rank = lambda stack: sum(size > 1 for size in stack.g.shape[1:])
    ranks = rule.rows_of(stacks, [jnp.full(len(stack.leaves), rank(stack)) for stack in stacks])
    own = features.tensor_features(statistics, ranks)
    inputs = jnp.concatenate([jnp.broadcast_to(shared, (len(own), shared.size)), own], axis=1)
    finite = [jnp.all(jnp.isfinite(x)) for x in (statistics, largest, inputs)]
    return inputs, finite[0] & finite[1] & finite[2]
