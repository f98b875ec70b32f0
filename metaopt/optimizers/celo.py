"""Celo and Celo-Adam: an LSTM that sees time and the loss scales the steps of all parameters."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_fields, check_integer
from metaopt.core.trees import add_to_count, all_finite, check_float_tree, check_same_structure
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
from metaopt.optimizers.layouts import celo_adam_shapes, celo_shapes, check_theta, init_theta
from metaopt.optimizers.velo_networks import (
    absorb_memory,
    controls_of,
    lstm_step,
    mix_bank,
    step_sizes_of,
)

################################################################################
# The scheduler
################################################################################


class Schedule(NamedTuple):
    """State of the scheduler that Celo and Celo-Adam share.

    Attributes:
      t: int32 ``[]``, number of updates so far, skipped ones included.
      skipped: int32 ``[]``, number of updates skipped because an input was not finite.
      loss: running means of the loss; its count is that of the updates that were not skipped.
      hidden: memory of the LSTM, float32 ``[1, hidden]``.
      cell: memory of the LSTM, float32 ``[1, hidden]``.
    """

    t: Int[Array, ""]
    skipped: Int[Array, ""]
    loss: features.LossBuffer
    hidden: Float[Array, "1 hidden"]
    cell: Float[Array, "1 hidden"]


def _init_schedule(theta: Theta) -> Schedule:
    return Schedule(
        t=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        loss=features.init_loss_buffer(),
        **theta["lstm_init_state"],
    )


def _advance(
    theta: Theta, schedule: Schedule, num_steps: Any, value: Any, is_finite: jax.Array
) -> tuple[jax.Array, Schedule]:
    """Returns the step size ``[]`` and the new state.

    Args:
      theta: meta-parameters.
      schedule: the old state.
      num_steps: horizon of the run.
      value: the loss.
      is_finite: bool ``[]``; if False, the update is skipped.
    """
    horizon = jnp.asarray(num_steps, jnp.int32)
    loss, x = features.progress_features(schedule.loss, value, schedule.t, horizon)
    hidden, cell = lstm_step(theta, x[None], schedule.hidden, schedule.cell)
    step_size = 0.1 * jnp.exp(step_sizes_of(theta, hidden)[0])
    loss, hidden, cell = optax.tree.where(
        is_finite, (loss, hidden, cell), (schedule.loss, schedule.hidden, schedule.cell)
    )
    return step_size, Schedule(
        t=add_to_count(schedule.t),
        skipped=add_to_count(schedule.skipped, ~is_finite),
        loss=loss,
        hidden=hidden,
        cell=cell,
    )


def _absorb(theta: Theta, state: Any) -> Theta:
    return absorb_memory(theta, state.schedule)


################################################################################
# Celo
################################################################################


@dataclass(frozen=True, kw_only=True)
class Celo:
    """Celo: a small network steps each parameter, an LSTM sets the step size of all.

    Attributes:
      hidden: units of the LSTM.
      bank: number of networks that the LSTM mixes.
      scheduler: whether the LSTM sets the step size; False in the first phase of meta-training.
      warn_past_horizon: warn when a run goes past its horizon.
    """

    name: ClassVar[str] = "celo"
    hidden: int = 64
    bank: int = 1
    scheduler: bool = True
    warn_past_horizon: bool = True

    def __post_init__(self):
        check_fields(self)
        _check_sizes("Celo.", hidden=self.hidden, bank=self.bank)

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        return celo(
            self.hidden, self.bank, self.scheduler, warn_past_horizon=self.warn_past_horizon
        )


class CeloState(NamedTuple):
    """State of Celo, float32.

    "Like params" means a tree with the structure of params.

    Attributes:
      schedule: state of the scheduler.
      momenta: mean gradients for the decays (0.9, 0.99, 0.999), each like params.
      v: mean squared gradient, like params.
      factored: like params, with a `velo_features.Factored` in place of each leaf.
    """

    schedule: Schedule
    momenta: tuple[Any, ...]
    v: Any
    factored: Any


def celo(
    hidden: int = 64, bank: int = 1, scheduler: bool = True, *, warn_past_horizon: bool = True
) -> LearnedOptimizer:
    r"""Celo: a small MLP steps each parameter, an LSTM sets one step size for all.

    .. math:: \lambda_t, s_{t+1} = \mathrm{LSTM}(\phi_t, s_t), \qquad (d, a) = \mathrm{MLP}(z_t)

    .. math:: x_{t+1} = x_t - 10^{-3} \, \lambda_t \, \sqrt{\overline{x_t^2} + 10^{-9}} \;
       d \, e^{a / 1000}

    where :math:`\phi` are 18 numbers on time and the loss, :math:`s` is the memory of the LSTM,
    :math:`z` are the 30 columns of VeLO per parameter, and a bar is the mean over a tensor. The
    step size :math:`\lambda = 0.1 \exp(\cdot)` is positive and the same for all tensors. With
    `bank` > 1 the MLP is the mean of N networks, weighted by a softmax of the LSTM's outputs.

    The computation is in float32; updates have the dtype of each gradient leaf. After the horizon
    `num_steps` the features of time stay at the last planned step. An update whose loss, gradient
    or parameters are not finite changes neither parameters nor memory; ``state.schedule.skipped``
    counts it, and so does ``state.schedule.t``. `absorb` replaces theta's initial memory by that of
    the state.

    Args:
      hidden: units of the LSTM, for `init`; `apply` reads the size from theta.
      bank: N, for `init`; `apply` reads the size from theta.
      scheduler: whether the LSTM sets the step size. False is the first phase of the published
        meta-training, with :math:`\lambda = 1`; the LSTM runs, and mixes a bank.
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
      Moudgil et al., [Celo: Training Versatile Learned Optimizers on a Compute Diet](
      https://arxiv.org/abs/2501.12670), 2025, section 4

      docs/optimizers/celo.md has every formula, and lists what differs from the published code.
    """
    _check_sizes("celo: ", hidden=hidden, bank=bank)

    def init(key, params):
        del params  # one theta serves trees of any structure
        return init_theta(key, celo_shapes(hidden, bank))

    def apply(theta, *, num_steps=None):
        check_num_steps("celo", num_steps)
        check_theta("celo", theta)
        weights = optax.tree.cast(theta, jnp.float32)

        def init_fn(params):
            accumulators = rule.init_accumulators("celo", params)
            return CeloState(schedule=_init_schedule(weights), **accumulators)

        def update_fn(updates, state: CeloState, params=None, *, value=None, **extra_args):
            del extra_args
            check_params("celo", params)
            check_value("celo", value)
            if warn_past_horizon:
                warn_at_horizon("celo", state.schedule.t, jnp.asarray(num_steps, jnp.int32))
                warn_of_frozen_leaves(
                    "celo",
                    theta,
                    state.schedule.t,
                    state.schedule.skipped,
                    params,
                    lambda: rule.are_frozen(state),
                )
            stacks = rule.stack("celo", updates, state, params)
            value = jnp.asarray(value, jnp.float32)
            is_finite = jnp.isfinite(value) & rule.are_finite(rule.Rule(), stacks)
            step_size, schedule = _advance(weights, state.schedule, num_steps, value, is_finite)
            controls = jax.nn.softmax(controls_of(weights, schedule.hidden))
            layers = [(w[0], b[0]) for w, b in mix_bank(weights, controls)]
            # The barrier keeps these small results from being computed again inside each loop.
            is_finite, layers, step_size = jax.lax.optimization_barrier(
                (is_finite, layers, step_size if scheduler else jnp.ones((), jnp.float32))
            )

            def step_fn(tensor, g):
                return -rule.relative_step(layers, step_size, tensor, g)

            steps, stacks = rule.step_stacks(rule.Rule(), step_fn, stacks, is_finite)
            deltas, state = rule.unstack(steps, stacks, updates, state, params)
            return deltas, state._replace(schedule=schedule)

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(init, apply, _absorb)


def _check_sizes(where: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        check_integer(f"{where}{name}", size, 1)


################################################################################
# Celo-Adam
################################################################################


@dataclass(frozen=True, kw_only=True)
class CeloAdam:
    """Celo-Adam: Adam whose step size an LSTM sets.

    Attributes:
      hidden: units of the LSTM.
      warn_past_horizon: warn when a run goes past its horizon.
    """

    name: ClassVar[str] = "celo_adam"
    hidden: int = 64
    warn_past_horizon: bool = True

    def __post_init__(self):
        check_fields(self)
        _check_sizes("CeloAdam.", hidden=self.hidden)

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        return celo_adam(self.hidden, warn_past_horizon=self.warn_past_horizon)


class CeloAdamState(NamedTuple):
    """State of Celo-Adam, float32.

    Attributes:
      schedule: state of the scheduler.
      mu: mean gradient, decay 0.9, a tree like params.
      nu: mean squared gradient, decay 0.999, a tree like params.
    """

    schedule: Schedule
    mu: Any
    nu: Any


def celo_adam(hidden: int = 64, *, warn_past_horizon: bool = True) -> LearnedOptimizer:
    r"""Celo-Adam: Adam whose step size an LSTM sets from time and the loss.

    .. math:: \lambda_t, s_{t+1} = \mathrm{LSTM}(\phi_t, s_t), \qquad x_{t+1} = x_t - 10^{-3} \,
       \lambda_t \, \hat m / (10^{-8} + \sqrt{\hat v + 10^{-10}})

    with Celo's scheduler (see `celo`), and Adam's bias-corrected moments :math:`\hat m, \hat v` of
    the gradient, clipped to [-1000, 1000]. The denominator is never below 1e-5.

    The computation is in float32; updates have the dtype of each gradient leaf. After the horizon
    `num_steps` the features of time stay at the last planned step. An update whose loss or gradient
    is not finite changes neither parameters nor memory; ``state.schedule.skipped`` counts it, and
    so does ``state.schedule.t``. `absorb` replaces theta's initial memory by that of the state.

    Args:
      hidden: units of the LSTM, for `init`; `apply` reads the size from theta.
      warn_past_horizon: warn when a run goes past its horizon, by a host callback in the compiled
        program. Use False to export or cache the program, which a callback prevents.

    Returns:
      A `LearnedOptimizer`. Its `apply` needs `num_steps`. Its `update` needs the loss as the extra
      arg `value`, does not need `params`, and ignores other extra args. The state holds 2 floats
      per parameter.

    Raises:
      ValueError: when `hidden` is below 1; at `apply`, when `num_steps` is missing, no integer or
        below 1 (a traced one is not checked), or theta is of another optimizer; at `update`, when
        `value` is missing or trees do not fit.

    References:
      Moudgil et al., [Celo: Training Versatile Learned Optimizers on a Compute Diet](
      https://arxiv.org/abs/2501.12670), 2025

      docs/optimizers/celo.md has every formula, and lists what differs from the published code.
    """
    _check_sizes("celo_adam: ", hidden=hidden)

    def init(key, params):
        del params  # one theta serves trees of any structure
        return init_theta(key, celo_adam_shapes(hidden))

    def apply(theta, *, num_steps=None):
        check_num_steps("celo_adam", num_steps)
        check_theta("celo_adam", theta)
        weights = optax.tree.cast(theta, jnp.float32)

        def init_fn(params):
            check_float_tree("celo_adam", params)
            zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
            return CeloAdamState(_init_schedule(weights), mu=zeros, nu=optax.tree.zeros_like(zeros))

        def update_fn(updates, state: CeloAdamState, params=None, *, value=None, **extra_args):
            del extra_args
            check_value("celo_adam", value)
            if params is not None:
                check_same_structure("celo_adam: updates", params, updates)
            check_same_structure("celo_adam: updates, compared with the state's", state.mu, updates)
            if warn_past_horizon:
                warn_at_horizon("celo_adam", state.schedule.t, jnp.asarray(num_steps, jnp.int32))
            value = jnp.asarray(value, jnp.float32)
            is_finite = jnp.isfinite(value) & all_finite(updates)
            step_size, schedule = _advance(weights, state.schedule, num_steps, value, is_finite)
            # The number of gradients in the moments; 0 if all were skipped.
            count = jnp.maximum(schedule.loss.count, 1).astype(jnp.float32)
            scale_m = jnp.where(is_finite, 0.001 * step_size / (1 - 0.9**count), 0.0)
            scale_v = 1 / (1 - 0.999**count)
            is_finite, scale_m, scale_v = jax.lax.optimization_barrier(
                (is_finite, scale_m, scale_v)
            )

            def step_leaf(g, m, v):
                clipped = jnp.where(is_finite, jnp.clip(g.astype(jnp.float32), -1e3, 1e3), 0.0)
                m = jnp.where(is_finite, 0.9 * m + 0.1 * clipped, m)
                v = jnp.where(is_finite, 0.999 * v + 0.001 * jnp.square(clipped), v)
                step = scale_m * m / (1e-8 + jnp.sqrt(scale_v * v + 1e-10))
                return (-step).astype(g.dtype), m, v

            treedef = jax.tree.structure(updates)
            trees = (updates, state.mu, state.nu)
            leaves = zip(*map(treedef.flatten_up_to, trees), strict=True)
            moved = [step_leaf(*leaf) for leaf in leaves]
            deltas, mu, nu = (treedef.unflatten([leaf[k] for leaf in moved]) for k in range(3))
            return deltas, CeloAdamState(schedule=schedule, mu=mu, nu=nu)

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(init, apply, _absorb)
