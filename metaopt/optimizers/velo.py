"""The VeLO-style hypernetwork optimizer: an LSTM per tensor writes an MLP for each parameter."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_integer
from metaopt.core.trees import check_float_tree, check_same_structure
from metaopt.core.types import LearnedOptimizer, Theta, transformation
from metaopt.optimizers import velo_features as features
from metaopt.optimizers.velo_import import check_theta
from metaopt.optimizers.velo_networks import direction, init_theta, mix_bank, tensor_network

_STEP_SCALE = 0.001
_CLIP = 1000.0


class VeloState(NamedTuple):
    """All float32 unless said otherwise; "like params": a tree with the structure of params.

    Attributes:
      t: int32 ``[]``, updates so far, skipped ones included.
      skipped: int32 ``[]``, updates that were skipped because an input was not finite.
      loss: running means of the loss, `velo_features.LossBuffer`.
      hidden, cell: memory of the per-tensor LSTM, ``[n_tensors, hidden]``; rows in the order of
        `jax.tree.leaves(params)`, tensors without elements left out.
      momenta: for each decay (0.9, 0.99, 0.999) the mean gradient, like params.
      v: the mean squared gradient, like params.
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


class _Tensor(NamedTuple):
    """The parameters and the accumulators of one tensor."""

    p: Float[Array, "..."]
    momenta: tuple[jax.Array, ...]
    v: Float[Array, "..."]
    factored: features.Factored


def _tensors(params, state: VeloState) -> list[_Tensor]:
    treedef = jax.tree.structure(params)
    momenta = zip(*map(treedef.flatten_up_to, state.momenta), strict=True)
    parts = (treedef.flatten_up_to(tree) for tree in (state.v, state.factored))
    leaves = [p.astype(jnp.float32) for p in map(jnp.asarray, jax.tree.leaves(params))]
    return [_Tensor(*fields) for fields in zip(leaves, momenta, *parts, strict=True)]


def _init_state(theta: Theta, params: Any) -> VeloState:
    check_float_tree("velo", params)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
    rows = sum(p.size > 0 for p in jax.tree.leaves(zeros))
    memory = theta["lstm_init_state"]
    return VeloState(
        t=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        loss=features.init_loss_buffer(),
        hidden=jnp.repeat(memory["hidden"], rows, axis=0),
        cell=jnp.repeat(memory["cell"], rows, axis=0),
        momenta=tuple(optax.tree.zeros_like(zeros) for _ in features.MOMENTUM_DECAYS),
        v=zeros,
        factored=jax.tree.map(features.init_factored, zeros),
    )


def _tensor_inputs(
    tensors: Sequence[_Tensor], shared: Float[Array, " shared"], grads: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Rows of the per-tensor network ``[n_tensors, 30]``, and whether all they rest on is finite.

    The networks' outputs are not looked at: a theta that is not finite shall show in the
    parameters, where meta-training sees it, and not hide behind skipped steps.
    """
    statistics = jnp.stack([features.tensor_statistics(x.p, x.momenta, x.v) for x in tensors])
    largest = jnp.stack([jnp.max(jnp.abs(g)) for g in grads])
    ranks = [sum(size > 1 for size in g.shape) for g in grads]
    own = features.tensor_features(statistics, ranks)
    x = jnp.concatenate([jnp.broadcast_to(shared, (len(ranks), shared.size)), own], axis=1)
    finite = [jnp.all(jnp.isfinite(y)) for y in (statistics, largest, x)]
    return x, finite[0] & finite[1] & finite[2]


def _accumulate(tensor: _Tensor, g: Float[Array, "..."]) -> _Tensor:
    decay = features.RMS_DECAY
    return tensor._replace(
        momenta=tuple(
            d * m + (1 - d) * g
            for d, m in zip(features.MOMENTUM_DECAYS, tensor.momenta, strict=True)
        ),
        v=decay * tensor.v + (1 - decay) * jnp.square(g),
        factored=features.update_factored(tensor.factored, g),
    )


def _step(tensor: _Tensor, g: Float[Array, "..."], layers, step_size) -> jax.Array:
    scale = jnp.sqrt(jnp.mean(jnp.square(tensor.p)) + 1e-9)
    seen = features.columns(g, *tensor)
    mean_square = features.in_group_order(
        features.mean_squares(seen.dense),
        *(jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim))) for x in (seen.row, seen.col)),
    )
    # The columns are needed twice; behind the barrier they are computed again, not stored.
    tensor, g = jax.lax.optimization_barrier((tensor, g))
    seen = features.columns(g, *tensor)
    return step_size * _STEP_SCALE * scale * direction(layers, mean_square, seen)


def _update(
    theta: Theta, num_steps: jax.Array, grads: list, state: VeloState, params: Any, value: Any
) -> tuple[list[jax.Array], VeloState]:
    """The steps of the leaves, to be subtracted, and the new state."""
    tensors = _tensors(params, state)
    live = [k for k, tensor in enumerate(tensors) if tensor.p.size > 0]
    grads = [g.astype(jnp.float32) for g in grads]
    steps = [jnp.zeros_like(g) for g in grads]

    if not live:
        return steps, state._replace(t=state.t + 1)
    value = jnp.asarray(value, jnp.float32)
    loss, loss_features = features.update_loss_buffer(
        state.loss, jnp.where(jnp.isfinite(value), value, 0.0), num_steps
    )
    times = features.time_features(jnp.minimum(state.t, num_steps - 1), num_steps)
    shared = jnp.concatenate([times, loss_features])
    rows, ok = _tensor_inputs([tensors[k] for k in live], shared, [grads[k] for k in live])
    ok = ok & jnp.isfinite(value)
    controls, step_sizes, hidden, cell = tensor_network(theta, rows, state.hidden, state.cell)
    # The barrier keeps these small results from being computed again inside each loop below.
    ok, layers, step_sizes = jax.lax.optimization_barrier(
        (ok, mix_bank(theta, controls), step_sizes)
    )
    for row, k in enumerate(live):
        g = jnp.where(ok, jnp.clip(grads[k], -_CLIP, _CLIP), 0.0)
        moved = _accumulate(tensors[k], g)
        tensors[k] = optax.tree.where(ok, moved, tensors[k])
        own = [(w[row], b[row]) for w, b in layers]
        steps[k] = jnp.where(ok, _step(tensors[k], g, own, step_sizes[row]), 0.0)

    unflatten = jax.tree.structure(params).unflatten
    kept = optax.tree.where(ok, (loss, hidden, cell), (state.loss, state.hidden, state.cell))
    return steps, VeloState(
        t=state.t + 1,
        skipped=state.skipped + jnp.where(ok, 0, 1),
        loss=kept[0],
        hidden=kept[1],
        cell=kept[2],
        momenta=tuple(
            unflatten(column) for column in zip(*(x.momenta for x in tensors), strict=True)
        ),
        v=unflatten([tensor.v for tensor in tensors]),
        factored=unflatten([tensor.factored for tensor in tensors]),
    )


def _warn_past_horizon(t, num_steps):
    if t == num_steps:  # looked at again: under vmap a cond runs both of its branches
        warnings.warn(
            f"velo: this run goes past its horizon num_steps={num_steps}; the features of time "
            "stay at the last planned step. Give apply(theta, num_steps=...) the whole run.",
            stacklevel=2,
        )


def _check_horizon(num_steps):
    if num_steps is None:
        raise ValueError(
            "velo: apply needs the number of updates of the run, apply(theta, num_steps=...): "
            "the step depends on the part of the run that is done."
        )
    if isinstance(num_steps, Tracer):
        return
    check_integer("velo: num_steps", num_steps, 1)


def _check_call(value, params):
    call = "update(grads, state, params, value=loss)"
    if params is None:
        raise ValueError(f"velo: update needs `params`, steps are relative to their size: {call}.")
    if value is None:
        raise ValueError(f"velo: update needs the loss as the extra argument `value`: {call}.")
    if jnp.shape(value) != ():
        raise ValueError(f"velo: `value` must be one number, got shape {jnp.shape(value)}: {call}.")


def velo(hidden: int = 512, bank: int = 256, *, warn_past_horizon: bool = True) -> LearnedOptimizer:
    r"""VeLO-style hypernetwork: a per-tensor LSTM writes a small MLP that steps each parameter.

    .. math:: c, \lambda, s_{t+1} = \mathrm{LSTM}(\phi_t, s_t), \qquad
       W = \frac{100}{N} \sum_{i=1}^{N} c_i \Theta_i, \qquad (d, a) = \mathrm{MLP}_W(z_t)

    .. math:: x_{t+1} = x_t - 10^{-3} \, \lambda \, \sqrt{\overline{x_t^2} + 10^{-9}} \;
       d \, e^{a / 1000}

    with 30 numbers :math:`\phi` per tensor (time, loss, accumulators, rank), 30 numbers
    :math:`z` per parameter (gradient, parameter, momenta, second moments) and a bank
    :math:`\Theta` of N networks 30-4-4-3. docs/optimizers/velo.md has every formula.

    Computes in float32 and returns each gradient leaf's own dtype. Past the horizon `num_steps`
    the features of time stay at the last planned step. An update whose loss, gradient or
    parameters are not finite changes neither parameters nor memory; it is counted in
    ``state.skipped`` (and in ``state.t``). `absorb` writes the mean over tensors of the LSTM's
    memory into theta's initial memory.

    Args:
      hidden: units of the LSTM, for `init`; `apply` takes any size from theta.
      bank: N, for `init`; `apply` takes any size from theta.
      warn_past_horizon: warn when a run goes past its horizon, by a host callback inside the
        compiled program. False: no callback (with one, a program cannot be exported or cached).

    Returns:
      A `LearnedOptimizer`. Its `apply` requires `num_steps`, its `update` requires `params` and
      the loss as the extra argument `value`; other extra arguments are ignored. The state holds
      about 4 floats per parameter.

    Raises:
      ValueError: a size below 1; `num_steps` missing, not an integer or below 1 (not checked
        where it is traced); a theta of another optimizer; `params` or `value` missing.

    References: Metz et al. 2022, "VeLO: Training Versatile Learned Optimizers by Scaling Up".
    """
    for name, size in {"hidden": hidden, "bank": bank}.items():
        check_integer(f"velo: {name}", size, 1)

    def init(key, params):
        del params  # one theta serves trees of any structure
        return init_theta(key, hidden, bank)

    def apply(theta, *, num_steps=None):
        _check_horizon(num_steps)
        check_theta(theta, "velo")
        weights = optax.tree.cast(theta, jnp.float32)

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

        return transformation(lambda params: _init_state(weights, params), update_fn)

    def absorb(theta: Any, state: VeloState):
        if state.hidden.shape[0] == 0:
            return theta
        memory = {"hidden": state.hidden, "cell": state.cell}
        mean = jax.tree.map(lambda x: jnp.mean(x, axis=0, keepdims=True), memory)
        return {**theta, "lstm_init_state": mean}

    return LearnedOptimizer(init, apply, absorb)
