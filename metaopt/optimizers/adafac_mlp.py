"""The small MLP optimizer of learned_optimization, with learned decays and a step counter."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from metaopt.core.checks import check_fields
from metaopt.core.trees import add_to_count
from metaopt.core.types import LearnedOptimizer, Theta, transformation
from metaopt.optimizers import velo_rule as rule
from metaopt.optimizers.features import check_params, warn_of_frozen_leaves
from metaopt.optimizers.layouts import adafac_mlp_shapes, check_theta, init_theta
from metaopt.optimizers.velo_features import Decays
from metaopt.optimizers.velo_networks import Layer

_TIMES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
_LARGEST = 1e9  # the square of a squared gradient must not overflow float32


@dataclass(frozen=True, kw_only=True)
class AdafacMLP:
    """The small MLP optimizer of learned_optimization.

    Attributes:
      warn_frozen: warn once of leaves whose gradient has been zero since the start.
    """

    name: ClassVar[str] = "adafac_mlp"
    warn_frozen: bool = True

    def __post_init__(self):
        check_fields(self)

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        return adafac_mlp(warn_frozen=self.warn_frozen)


class AdafacMLPState(NamedTuple):
    """State of the adafac MLP, float32 unless said otherwise.

    Attributes:
      t: int32 ``[]``, number of updates so far, skipped ones included.
      skipped: int32 ``[]``, number of updates skipped because an input was not finite.
      momenta: mean gradients for three decays, each like params.
      v: mean squared gradient, like params.
      factored: like params, with a `velo_features.Factored` in place of each leaf.
    """

    t: Int[Array, ""]
    skipped: Int[Array, ""]
    momenta: tuple[Any, ...]
    v: Any
    factored: Any


def adafac_mlp(*, warn_frozen: bool = True) -> LearnedOptimizer:
    r"""The small MLP optimizer of learned_optimization: 197 numbers, no horizon, no loss.

    .. math:: (d, a) = \mathrm{MLP}(z_t, \tau_t), \qquad x_{t+1} = x_t - 10^{-3} d \, e^{a / 1000}

    where :math:`z` are 28 of VeLO's columns per parameter, each divided by its root mean square
    over the tensor, and :math:`\tau` are 11 numbers on the count of updates. The decays of the
    accumulators are learned.

    The computation is in float32; updates have the dtype of each gradient leaf. An update whose
    gradient or parameters are not finite changes neither parameters nor memory; a gradient of 1e9
    or more counts as not finite, since its fourth power leaves float32. ``state.skipped`` counts
    such updates, and so does ``state.t``.

    Args:
      warn_frozen: warn once of leaves whose gradient has been zero since the start, by a host
        callback in the compiled program. Use False to export or cache the program, which a
        callback prevents.

    Returns:
      A `LearnedOptimizer` without a horizon. Its `update` needs `params`, and ignores all extra
      args. The state holds about 4 floats per parameter.

    Raises:
      ValueError: at `apply`, when theta is of another optimizer; at `update`, when `params` is
        missing or trees do not fit.

    References:
      Metz et al., [Practical tradeoffs between memory, compute, and performance in learned
      optimizers](https://arxiv.org/abs/2203.11860), 2022

      docs/optimizers/adafac_mlp.md has every formula, and lists what differs from the published
      code.
    """

    def init(key, params):
        del params  # one theta serves trees of any structure
        return init_theta(key, adafac_mlp_shapes())

    def apply(theta, *, num_steps=None):
        del num_steps  # this optimizer does not know its horizon
        check_theta("adafac_mlp", theta)
        weights = optax.tree.cast(theta, jnp.float32)
        constants = rule.Rule(
            decays=_decays(weights), clip=_LARGEST, largest=_LARGEST, diag_eps=1e-6
        )

        def init_fn(params):
            zero = jnp.zeros((), jnp.int32)
            accumulators = rule.init_accumulators("adafac_mlp", params)
            return AdafacMLPState(t=zero, skipped=zero, **accumulators)

        def update_fn(updates, state: AdafacMLPState, params=None, **extra_args):
            del extra_args
            check_params("adafac_mlp", params)
            stacks = rule.stack("adafac_mlp", updates, state, params)
            if warn_frozen:
                warn_of_frozen_leaves(
                    "adafac_mlp",
                    theta,
                    state.t,
                    state.skipped,
                    params,
                    lambda: rule.are_frozen(state),
                )
            is_finite, layers = jax.lax.optimization_barrier(
                (rule.are_finite(constants, stacks), _layers(weights, state.t))
            )

            def step_fn(tensor, g):
                d, a, _ = rule.outputs(constants, layers, tensor, g)
                return -0.001 * d * jnp.exp(0.001 * a)

            steps, stacks = rule.step_stacks(constants, step_fn, stacks, is_finite)
            deltas, state = rule.unstack(steps, stacks, updates, state, params)
            skipped = add_to_count(state.skipped, ~is_finite)
            return deltas, state._replace(t=add_to_count(state.t), skipped=skipped)

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(init, apply)


def _decays(theta: Theta) -> Decays:
    """Returns the learned decays: 1 - (1 - d) exp(10 delta), with the decays d of VeLO."""
    start = Decays()

    def move(decays, delta):
        return tuple(1 - (1 - d) * jnp.exp(10.0 * x) for d, x in zip(decays, delta, strict=True))

    within = lambda decays: tuple(jnp.clip(d, 0.0, 1.0) for d in decays)
    return Decays(
        momenta=move(start.momenta, theta["momentum_decays"]),
        v=within(move((start.v,), theta["rms_decays"]))[0],
        factored=within(move(start.factored, theta["adafactor_decays"])),
    )


def _layers(theta: Theta, t: Int[Array, ""]) -> list[Layer]:
    """Returns the layers for 30 columns: weights of 0 for two of them, time in the bias."""
    net = theta["nn"]["~"]
    w0, zero = net["w0"], jnp.zeros((1, net["w0"].shape[1]), jnp.float32)
    # Groups 1 (the clipped gradient) and 8 (g r) are no inputs of this network.
    columns = jnp.concatenate([w0[:1], zero, w0[1:13], zero, w0[13:28]])
    time = jnp.tanh(t.astype(jnp.float32) / jnp.asarray(_TIMES, jnp.float32) - 1.0)
    bias = net["b0"] + jnp.matmul(time, w0[28:], precision="highest")
    return [(columns, bias), (net["w1"], net["b1"]), (net["w2"], net["b2"])]
