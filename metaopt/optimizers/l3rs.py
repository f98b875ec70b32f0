"""L3RS: a small network per layer that mixes the directions of base optimizers."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_callable, check_integer, check_number
from metaopt.core.trees import all_finite, check_float_tree, check_same_structure, leaf_names
from metaopt.core.types import LearnedOptimizer, transformation
from metaopt.optimizers.bases import Base, resolve
from metaopt.optimizers.features import (
    absolute_time,
    check_num_steps,
    ema_debias,
    ema_update,
    relative_time,
    safe_log,
)
from metaopt.optimizers.l3rs_layers import Variant, check_layers, check_parts, layers_of

EMA_SETS: dict[str, tuple[float, ...]] = {
    "three": (0.5, 0.9, 0.99),
    "one": (0.9,),
    "raw": (0.0,),
    "none": (),
}
TIME_POINTS = tuple(j / 10 for j in range(11))
TIME_SCALES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


class L3RSState(NamedTuple):
    """State of L3RS with L layers, P base optimizers and G averages.

    Attributes:
      count: steps taken, int32 [].
      base: the P states of the base optimizers.
      norms: averages ``[L, 2, G]`` of log weight norm and log gradient norm (before debiasing);
        () where G is 0, since orbax saves no arrays without elements.
      loss: averages ``[G]`` of the loss (before debiasing), or ().
      lambda_: the last step's norm per layer ``[L]``.
      alpha: the last step's mixture per layer ``[L, P]``; rows sum to 1.
      skipped: steps left out since loss, gradient or the step was not finite, int32 [].
    """

    count: Int[Array, ""]
    base: tuple[Any, ...]
    norms: Any
    loss: Any
    lambda_: Float[Array, " L"]
    alpha: Float[Array, "L P"]
    skipped: Int[Array, ""]


class LayerNet(nn.Module):
    """Two hidden layers with ReLU; the outputs start at zero: mean direction, norm lambda_0."""

    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x):
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros)(x)


def l3rs(
    base: Sequence[str | Base | optax.GradientTransformation] = ("sgd", "adam"),
    *,
    variant: Variant = "embedding",
    ema: str | Sequence[float] = "three",
    hidden: Sequence[int] = (32, 32),
    embedding_dim: int = 16,
    lambda_0: float = 1e-2,
    layer_names: Callable[[Any], list[str]] = leaf_names,
) -> LearnedOptimizer:
    r"""Mixes base directions per layer, with a learned step norm and learned weights.

    .. math:: x_l \leftarrow x_l + \lambda_l \sum_p \alpha_{l,p} \, d_{l,p} / \|d_{l,p}\|_2,
       \quad \alpha_l = \mathrm{softmax}(o_1, .., o_P), \quad
       \lambda_l = \lambda_0 \, e^{o_0}

    with o the outputs of a network that sees, per layer: debiased averages of log weight norm,
    log gradient norm and loss; relative and absolute time; an embedding of the layer; the log
    norms of the P directions. A direction of norm 0 contributes 0.

    Args:
      base: names (`metaopt.optimizers.BASES`), `Base`s, or any optax transformations with
        learning rate 1. Constants of named bases (betas, eps) are part of theta.
      variant: "embedding": one network, one learned embedding per layer; "none": one network,
        no embedding; "per_layer": a network per layer, no embedding; "global": one network on
        features averaged over layers, one lambda and alpha for all.
      ema: decays of the averages, or one of "three", "one", "raw" (the values), "none".
      hidden: units of the hidden layers.
      embedding_dim: size of a layer's embedding.
      lambda_0: step norm before meta-training.
      layer_names: params -> one name per leaf in `jax.tree.leaves` order; leaves of one name
        make one layer (its norms are taken over all of them). Default: each leaf is a layer.

    Returns:
      A `LearnedOptimizer`; `apply` needs `num_steps`, and
      ``update(grads, state, params, value=loss)`` needs params and the loss. A step with a
      non-finite loss or gradient changes nothing but counters. Beyond the base optimizers'
      states, memory is O(layers). Computes in float32.

    Raises: ValueError: an unknown or repeated base, variant or ema set; at `update`: params or
      value missing; at the transformation's `init`: layers that theta does not know.

    References: L3RS (Kristiansen et al. 2024), equation 2 and section 3; docs/optimizers/l3rs.md
      lists what the paper leaves open and what we chose.
    """
    bases = resolve(base)
    if variant not in ("embedding", "none", "per_layer", "global"):
        raise ValueError(
            f"l3rs: variant must be embedding, none, per_layer or global, got {variant!r}."
        )
    decays = _decays(ema)
    if not isinstance(hidden, list | tuple):
        raise ValueError(f"l3rs: hidden must be a sequence of layer sizes, got {hidden!r}.")
    for units in hidden:
        check_integer("l3rs: each entry of hidden", units, 1)
    check_integer("l3rs: embedding_dim", embedding_dim, 1)
    check_number("l3rs: lambda_0", lambda_0, above=0)
    check_callable("l3rs: layer_names", layer_names)
    gammas = jnp.asarray(decays, jnp.float32)
    net = LayerNet(tuple(hidden), 1 + len(bases))
    num_features = 3 * len(decays) + len(TIME_POINTS) + len(TIME_SCALES) + len(bases)
    num_features += embedding_dim * (variant == "embedding")

    def init(key, params):
        k_net, k_embedding = jax.random.split(key)
        names = layers_of(layer_names(params), params)[0]
        inputs = jnp.zeros((1, num_features))
        theta: dict[str, Any] = {
            "base": {
                b.name: {name: jnp.float32(value) for name, value in b.hyper.items()} for b in bases
            }
        }
        if variant == "per_layer":
            keys = jax.random.split(k_net, len(names))
            theta["net"] = {
                n: net.init(k, inputs)["params"] for n, k in zip(names, keys, strict=True)
            }
        else:
            theta["net"] = net.init(k_net, inputs)["params"]
        if variant == "embedding":
            table = 0.1 * jax.random.normal(k_embedding, (len(names), embedding_dim))
            theta["embedding"] = dict(zip(names, table, strict=True))
        return theta

    @cache
    def net_shapes():
        inputs = jnp.zeros((1, num_features))
        return jax.eval_shape(lambda: net.init(jax.random.key(0), inputs))["params"]

    def check_theta(theta):
        embedding = jax.ShapeDtypeStruct((embedding_dim,), jnp.float32)
        base = {b.name: dict(b.hyper) for b in bases}
        check_parts(theta, base, net_shapes(), embedding, variant)

    def outputs(theta, names, shared, per_layer) -> Any:
        """Network outputs ``[L, 1 + P]`` from features ``[S]`` of the run and ``[L, F]``."""
        features = jnp.concatenate(
            [jnp.broadcast_to(shared, (len(names), shared.size)), per_layer], axis=1
        )
        if variant == "embedding":
            table = jnp.stack([theta["embedding"][name] for name in names])
            features = jnp.concatenate([features, table], axis=1)
        if variant == "per_layer":
            nets = jax.tree.map(lambda *w: jnp.stack(w), *[theta["net"][name] for name in names])
            return jax.vmap(lambda w, x: net.apply({"params": w}, x))(nets, features)
        if variant == "global":
            features = jnp.mean(features, axis=0, keepdims=True)
        out: Any = net.apply({"params": theta["net"]}, features)
        return jnp.broadcast_to(out, (len(names), out.shape[1]))

    def apply(theta, *, num_steps=None):
        horizon = check_num_steps("l3rs", num_steps)
        check_theta(theta)
        txs = [optax.with_extra_args_support(b.make(theta["base"].get(b.name, {}))) for b in bases]

        def init_fn(params):
            check_float_tree("l3rs", params)
            names, _ = layers_of(layer_names(params), params)
            check_layers(theta, names, variant)
            size = len(names)
            floats = optax.tree.cast(params, jnp.float32)
            return L3RSState(
                count=jnp.zeros([], jnp.int32),
                base=tuple(tx.init(floats) for tx in txs),
                norms=jnp.zeros((size, 2, len(decays))) if decays else (),
                loss=jnp.zeros(len(decays)) if decays else (),
                lambda_=jnp.zeros(size),
                alpha=jnp.zeros((size, len(bases))),
                skipped=jnp.zeros([], jnp.int32),
            )

        def update_fn(updates, state: L3RSState, params=None, *, value=None, **extra_args):
            del extra_args
            if params is None:
                raise ValueError("l3rs: update needs `params`: update(grads, state, params, ...).")
            if value is None:
                raise ValueError(
                    "l3rs: update needs the loss: update(grads, state, params, value=loss)."
                )
            check_same_structure("l3rs: gradients, compared with params", params, updates)
            names, index = layers_of(layer_names(params), params)
            if len(names) != len(state.lambda_):
                raise ValueError(
                    f"l3rs: got {len(names)} layers for the state of {len(state.lambda_)}; use the "
                    "state of init(params) of the same params."
                )
            grads, weights = (optax.tree.cast(tree, jnp.float32) for tree in (updates, params))
            value = jnp.asarray(value, jnp.float32)
            norms_of = lambda tree: _layer_norms(tree, index, len(names))
            grad_norms = norms_of(grads)
            finite = all_finite(value, grad_norms)

            directions, base_states = zip(
                *[
                    tx.update(grads, s, weights, value=value, finite=finite)
                    for tx, s in zip(txs, state.base, strict=True)
                ],
                strict=True,
            )
            direction_norms = jnp.stack([norms_of(d) for d in directions], axis=1)  # [L, P]
            count = state.count + 1
            shared = [
                relative_time(state.count, horizon, TIME_POINTS),
                absolute_time(horizon, TIME_SCALES),
            ]
            per_layer, norms, loss = [safe_log(direction_norms)], state.norms, state.loss
            if decays:
                statistics = safe_log(jnp.stack([norms_of(weights), grad_norms], axis=1))  # [L, 2]
                norms = ema_update(state.norms, statistics, gammas)
                loss = ema_update(state.loss, value, gammas)
                debiased = ema_debias(norms, count, gammas).reshape(len(names), -1)
                shared, per_layer = (
                    [ema_debias(loss, count, gammas), *shared],
                    [debiased, *per_layer],
                )
            shared, per_layer = jnp.concatenate(shared), jnp.concatenate(per_layer, axis=1)
            out = outputs(theta, names, shared, per_layer)
            lambda_, alpha = lambda_0 * jnp.exp(out[:, 0]), jax.nn.softmax(out[:, 1:], axis=1)
            zero = direction_norms == 0
            inverse = jnp.where(zero, 0.0, 1.0 / jnp.where(zero, 1.0, direction_norms))
            factors = lambda_[:, None] * alpha * inverse  # [L, P]
            ok = finite & all_finite(factors)
            base_states = tuple(
                new if base.skips else optax.tree.where(ok, new, old)
                for base, new, old in zip(bases, base_states, state.base, strict=True)
            )
            new_state = L3RSState(count, (), norms, loss, lambda_, alpha, skipped=state.skipped)
            skip = state._replace(count=count, base=(), skipped=state.skipped + 1)
            new_state = optax.tree.where(ok, new_state, skip)._replace(base=base_states)
            step = _mix(directions, jnp.where(ok, factors, 0.0), index, ok)
            return optax.tree.cast_like(step, updates), new_state

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(init, apply)


def _decays(ema: str | Sequence[float]) -> tuple[float, ...]:
    if isinstance(ema, str) and ema not in EMA_SETS:
        raise ValueError(f"l3rs: ema must be decays or one of {', '.join(EMA_SETS)}, got {ema!r}.")
    decays = EMA_SETS[ema] if isinstance(ema, str) else tuple(ema)
    for gamma in decays:
        check_number("l3rs: each of the ema decays", gamma, least=0, below=1)
    return decays


def _layer_norms(tree: Any, index: list[int], num_layers: int) -> jax.Array:
    """2-norms ``[L]`` over the leaves of each layer; differentiable at zero."""
    squares = [jnp.zeros([])] * num_layers
    for layer, leaf in zip(index, jax.tree.leaves(tree), strict=True):
        squares[layer] = squares[layer] + jnp.sum(jnp.square(leaf))
    total = jnp.stack(squares)
    zero = total == 0  # not "total > 0": NaN must stay NaN, so that the step is seen to be bad
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, total)))


def _mix(directions, factors: jax.Array, index: list[int], ok: jax.Array):
    """Per leaf ``sum_p factors[layer, p] * direction_p``, and zero where `ok` is False."""
    treedef = jax.tree.structure(directions[0])
    leaves = zip(*[jax.tree.leaves(d) for d in directions], strict=True)
    mixed = [
        jnp.where(ok, sum(factors[layer, p] * d for p, d in enumerate(leaf)), 0.0)
        for layer, leaf in zip(index, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, mixed)
