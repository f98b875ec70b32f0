"""The VeLO-style hypernetwork optimizer: an LSTM per tensor writes an MLP for each parameter."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_fields, check_integer
from metaopt.core.trees import check_float_tree, check_same_structure
from metaopt.core.types import LearnedOptimizer, Theta, transformation
from metaopt.optimizers import velo_features as features
from metaopt.optimizers.features import check_num_steps
from metaopt.optimizers.velo_import import check_theta
from metaopt.optimizers.velo_networks import (
    Layer,
    direction,
    init_theta,
    mix_bank,
    tensor_network,
)

_STEP_SCALE = 0.001
_CLIP = 1000.0


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
      warn_past_horizon: warn when a run goes past its horizon, by a host callback in the compiled
        program. Use False to export or cache the program, which a callback prevents.

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
        return init_theta(key, hidden, bank)

    def apply(theta, *, num_steps=None):
        check_num_steps("velo", num_steps)
        check_theta(theta, "velo")
        weights = optax.tree.cast(theta, jnp.float32)

        def init_fn(params):
            return _init_state(weights, params)

        def update_fn(updates, state: VeloState, params=None, *, value=None, **extra_args):
            del extra_args
            _check_call(value, params)
            horizon = jnp.asarray(num_steps, jnp.int32)
            if warn_past_horizon:
                jax.lax.cond(
                    state.t == horizon,
                    lambda: jax.debug.callback(_warn_past_horizon, state.t, horizon),
                    lambda: None,
                )
            check_same_structure("velo: updates", params, updates)
            check_same_structure("velo: params, compared with the state's", state.v, params)
            treedef = jax.tree.structure(params)
            grads = treedef.flatten_up_to(updates)
            steps, new_state = _update(weights, horizon, grads, state, params, value)
            deltas = [(-step).astype(g.dtype) for step, g in zip(steps, grads, strict=True)]
            return treedef.unflatten(deltas), new_state

        return transformation(init_fn, update_fn)

    def absorb(theta: Any, state: VeloState):
        if state.hidden.shape[0] == 0:
            return theta
        memory = {"hidden": state.hidden, "cell": state.cell}
        mean = jax.tree.map(lambda x: jnp.mean(x, axis=0, keepdims=True), memory)
        return {**theta, "lstm_init_state": mean}

    return LearnedOptimizer(init, apply, absorb)


def _check_call(value, params):
    call = "update(grads, state, params, value=loss)"
    if params is None:
        raise ValueError(f"velo: update needs `params`, steps are relative to their size: {call}.")
    if value is None:
        raise ValueError(f"velo: update needs the loss as the extra argument `value`: {call}.")
    if jnp.shape(value) != ():
        raise ValueError(f"velo: `value` must be one number, got shape {jnp.shape(value)}: {call}.")


def _check_settings(where: str, *, hidden: Any, bank: Any) -> None:
    check_integer(f"{where}hidden", hidden, 1)
    check_integer(f"{where}bank", bank, 1)


def _warn_past_horizon(t, num_steps):
    if t == num_steps:  # compared again, since under vmap a cond runs both of its branches
        warnings.warn(
            f"velo: this run goes past its horizon num_steps={num_steps}; the features of time "
            "stay at the last planned step. Give apply(theta, num_steps=...) the whole run.",
            stacklevel=2,
        )


def _tensors(params: Any, state: VeloState) -> list[features.Tensor]:
    """Returns one `Tensor` per leaf of params."""
    treedef = jax.tree.structure(params)
    leaves = [jnp.asarray(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    momenta = zip(*[treedef.flatten_up_to(tree) for tree in state.momenta], strict=True)
    v, factored = treedef.flatten_up_to(state.v), treedef.flatten_up_to(state.factored)
    return [features.Tensor(*fields) for fields in zip(leaves, momenta, v, factored, strict=True)]


def _init_state(theta: Theta, params: Any) -> VeloState:
    check_float_tree("velo", params)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    num_tensors = sum(p.size > 0 for p in jax.tree.leaves(zeros))
    memory = theta["lstm_init_state"]
    return VeloState(
        t=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        loss=features.init_loss_buffer(),
        hidden=jnp.repeat(memory["hidden"], num_tensors, axis=0),
        cell=jnp.repeat(memory["cell"], num_tensors, axis=0),
        momenta=tuple(optax.tree.zeros_like(zeros) for _ in features.MOMENTUM_DECAYS),
        v=zeros,
        factored=jax.tree.map(features.init_factored, zeros),
    )


def _update(
    theta: Theta,
    num_steps: jax.Array,
    grads: list[jax.Array],
    state: VeloState,
    params: Any,
    value: Any,
) -> tuple[list[jax.Array], VeloState]:
    """Returns the steps of the leaves, to be subtracted, and the new state."""
    tensors = _tensors(params, state)
    grads = [g.astype(jnp.float32) for g in grads]
    steps = [jnp.zeros_like(g) for g in grads]
    nonempty = [index for index, tensor in enumerate(tensors) if tensor.p.size > 0]
    if not nonempty:
        return steps, state._replace(t=state.t + 1)

    # The per-tensor network, from the accumulators before this update.
    value = jnp.asarray(value, jnp.float32)
    loss, loss_features = features.update_loss_buffer(
        state.loss, jnp.where(jnp.isfinite(value), value, 0.0), num_steps
    )
    time_features = features.time_features(jnp.minimum(state.t, num_steps - 1), num_steps)
    inputs, inputs_are_finite = _tensor_inputs(
        [tensors[index] for index in nonempty],
        jnp.concatenate([time_features, loss_features]),
        [grads[index] for index in nonempty],
    )
    is_finite = inputs_are_finite & jnp.isfinite(value)
    controls, step_sizes, hidden, cell = tensor_network(theta, inputs, state.hidden, state.cell)
    # The barrier keeps these small results from being computed again inside each loop below.
    is_finite, layers, step_sizes = jax.lax.optimization_barrier(
        (is_finite, mix_bank(theta, controls), step_sizes)
    )

    # The per-parameter networks, tensor by tensor.
    for row, index in enumerate(nonempty):
        g = jnp.where(is_finite, jnp.clip(grads[index], -_CLIP, _CLIP), 0.0)
        accumulated = features.accumulate(tensors[index], g)
        tensors[index] = optax.tree.where(is_finite, accumulated, tensors[index])
        tensor_layers = [(w[row], b[row]) for w, b in layers]
        step = _step(tensors[index], g, tensor_layers, step_sizes[row])
        steps[index] = jnp.where(is_finite, step, 0.0)

    unflatten = jax.tree.structure(params).unflatten
    loss, hidden, cell = optax.tree.where(
        is_finite, (loss, hidden, cell), (state.loss, state.hidden, state.cell)
    )
    momenta = zip(*[tensor.momenta for tensor in tensors], strict=True)
    return steps, VeloState(
        t=state.t + 1,
        skipped=state.skipped + jnp.where(is_finite, 0, 1),
        loss=loss,
        hidden=hidden,
        cell=cell,
        momenta=tuple(unflatten(leaves) for leaves in momenta),
        v=unflatten([tensor.v for tensor in tensors]),
        factored=unflatten([tensor.factored for tensor in tensors]),
    )


def _tensor_inputs(
    tensors: Sequence[features.Tensor], shared: Float[Array, " shared"], grads: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the inputs of the per-tensor network, and whether all that they rest on is finite.

    The outputs of the networks are not checked. A theta that is not finite must show in the
    parameters, where meta-training sees it, and must not hide behind skipped steps.

    Args:
      tensors: the tensors, none of them empty.
      shared: features of time and of the loss, ``[18]``.
      grads: gradient of each tensor.

    Returns:
      The inputs ``[n_tensors, 30]``, and a bool ``[]``.
    """
    statistics = jnp.stack([features.tensor_statistics(tensor) for tensor in tensors])
    largest = jnp.stack([jnp.max(jnp.abs(g)) for g in grads])
    ranks = [sum(size > 1 for size in g.shape) for g in grads]
    own = features.tensor_features(statistics, ranks)
    inputs = jnp.concatenate([jnp.broadcast_to(shared, (len(ranks), shared.size)), own], axis=1)
    finite = [jnp.all(jnp.isfinite(x)) for x in (statistics, largest, inputs)]
    return inputs, finite[0] & finite[1] & finite[2]


def _step(
    tensor: features.Tensor, g: Float[Array, "..."], layers: list[Layer], step_size: jax.Array
) -> jax.Array:
    """Returns the step of a tensor, to be subtracted, from its new accumulators."""
    scale = jnp.sqrt(jnp.mean(jnp.square(tensor.p)) + 1e-9)
    mean_squares = features.mean_squares_of(features.columns(g, tensor))
    # The columns are needed twice. Behind the barrier they are computed again, not stored.
    tensor, g = jax.lax.optimization_barrier((tensor, g))
    columns = features.columns(g, tensor)
    return step_size * _STEP_SCALE * scale * direction(layers, mean_squares, columns)
