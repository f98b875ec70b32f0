"""L3RS: a small network mixes the directions of base optimizers, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_callable, check_fields, check_integer, check_number
from metaopt.core.trees import (
    add_to_count,
    all_finite,
    check_float_tree,
    check_same_structure,
    leaf_names,
)
from metaopt.core.types import LearnedOptimizer, Theta, transformation
from metaopt.optimizers.bases import Base, resolve
from metaopt.optimizers.features import (
    absolute_time,
    check_num_steps,
    ema_debias,
    ema_update,
    relative_time,
    safe_log,
)

Variant = Literal["embedding", "none", "per_layer", "global"]

EMA_SETS: dict[str, tuple[float, ...]] = {
    "three": (0.5, 0.9, 0.99),
    "one": (0.9,),
    "raw": (0.0,),
    "none": (),
}
TIME_POINTS = tuple(j / 10 for j in range(11))
TIME_SCALES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


@dataclass(frozen=True, kw_only=True)
class L3RS:
    """L3RS: a small network mixes the directions of base optimizers, layer by layer.

    Attributes:
      base: names of the base optimizers (`metaopt.optimizers.BASES`).
      variant: embedding fits networks with the same layers only; none and global fit any network.
      ema: the averages of its features: three (decays 0.5, 0.9, 0.99), one (0.9), raw (the values),
        none, or the decays themselves.
      hidden: units of the hidden layers.
      embedding_dim: size of a layer's embedding.
      lambda_0: step norm before meta-training.
    """

    name: ClassVar[str] = "l3rs"
    base: tuple[str, ...] = ("sgd", "adam")
    variant: Variant = "embedding"
    ema: Literal["three", "one", "raw", "none"] | tuple[float, ...] = "three"
    hidden: tuple[int, ...] = (32, 32)
    embedding_dim: int = 16
    lambda_0: float = 1e-2

    def __post_init__(self):
        check_fields(self)
        resolve(self.base)
        ema_decays(self.ema)
        _check_settings(
            "L3RS.",
            hidden=self.hidden,
            embedding_dim=self.embedding_dim,
            lambda_0=self.lambda_0,
        )

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        return l3rs(
            self.base,
            variant=self.variant,
            ema=self.ema,
            hidden=self.hidden,
            embedding_dim=self.embedding_dim,
            lambda_0=self.lambda_0,
        )


class L3RSState(NamedTuple):
    """State of L3RS with L layers, P base optimizers and G averages.

    Attributes:
      count: int32 ``[]``, number of steps so far.
      base: states of the P base optimizers.
      norms: float32 ``[L, 2, G]``, averages of log weight norm and log gradient norm, without bias
        correction; () when G is 0, since orbax saves no arrays without elements.
      loss: float32 ``[G]``, averages of the loss, without bias correction; () when G is 0.
      lambda_: float32 ``[L]``, norm of the last step of each layer.
      alpha: float32 ``[L, P]``, weights of the last step of each layer. Rows sum to 1.
      skipped: int32 ``[]``, number of steps skipped because the loss, the gradient or the step was
        not finite.
    """

    count: Int[Array, ""]
    base: tuple[Any, ...]
    norms: Any
    loss: Any
    lambda_: Float[Array, " L"]
    alpha: Float[Array, "L P"]
    skipped: Int[Array, ""]


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
    r"""L3RS: mixes base directions per layer, with a learned step norm and learned weights.

    .. math:: x_l \leftarrow x_l + \lambda_l \sum_{p=1}^{P} \alpha_{l,p} \, d_{l,p} / \|d_{l,p}\|_2,
       \quad \alpha_l = \mathrm{softmax}(o_{l,1}, \dots, o_{l,P}), \quad
       \lambda_l = \lambda_0 \, e^{o_{l,0}}

    where :math:`x_l` are the parameters of layer l, :math:`d_{l,p}` is the direction of base
    optimizer p and :math:`o_l` are the outputs of a small network. Its inputs are bias-corrected
    averages of the layer's log weight norm and log gradient norm and of the loss, relative and
    absolute time, an embedding of the layer, and the log norms of the P directions. A direction
    of norm 0 contributes 0. The computation is in float32; updates have the dtype of each leaf.

    Args:
      base: names in `metaopt.optimizers.BASES`, `Base`s, or any optax transformations with
        learning rate 1. The constants of named bases (betas, eps) are part of theta.
      variant: "embedding" has one network and a learned embedding per layer; "none" one network
        without embeddings, for any layers; "per_layer" a network per layer; "global" one network
        on features averaged over layers, with one lambda and alpha for all.
      ema: decays of the averages, each in [0, 1), or the name of a set: "three", "one", "raw" (no
        averaging), "none" (no statistics).
      hidden: units of the hidden layers.
      embedding_dim: size of the embedding of a layer.
      lambda_0: norm of a step before meta-training.
      layer_names: ``params -> names``, one per leaf in the order of `jax.tree.leaves`. Leaves of
        one name make one layer, whose norms are taken over all of them. By default each leaf is a
        layer.

    Returns:
      A `LearnedOptimizer`. Its `apply` needs `num_steps`. Its `update` needs `params` and the loss
      as the extra arg `value`, and ignores other extra args. A step whose loss or gradient is not
      finite changes nothing but counters. Beyond the states of the base optimizers, the state is
      of size O(layers).

    Raises:
      ValueError: when an argument is out of range, or a base is unknown or repeated; at `apply`,
        when `num_steps` is missing or theta does not fit; at `init`, when theta does not know a
        layer; at `update`, when `params` or `value` is missing or trees do not fit.

    References:
      Kristiansen et al., [Narrowing the Focus: Learned Optimizers for Pretrained Models](
      https://arxiv.org/abs/2408.09310), 2024, equation 2 and section 3

      docs/optimizers/l3rs.md lists what the paper leaves open and what we chose.
    """
    bases = resolve(base)
    if variant not in ("embedding", "none", "per_layer", "global"):
        raise ValueError(
            f"l3rs: variant must be embedding, none, per_layer or global, got {variant!r}."
        )
    decays = ema_decays(ema)
    _check_settings("l3rs: ", hidden=hidden, embedding_dim=embedding_dim, lambda_0=lambda_0)
    check_callable("l3rs: layer_names", layer_names)
    gammas = jnp.asarray(decays, jnp.float32)
    net = LayerNet(tuple(hidden), num_outputs=1 + len(bases))
    num_inputs = 3 * len(decays) + len(TIME_POINTS) + len(TIME_SCALES) + len(bases)
    if variant == "embedding":
        num_inputs += embedding_dim

    def init(key, params):
        k_net, k_embedding = jax.random.split(key)
        names, _ = layers_of(layer_names(params), params)
        inputs = jnp.zeros((1, num_inputs))
        theta: dict[str, Any] = {
            "base": {
                base.name: {name: jnp.float32(value) for name, value in base.hyper.items()}
                for base in bases
            }
        }
        if variant == "per_layer":
            keys = jax.random.split(k_net, len(names))
            theta["net"] = {
                name: net.init(k, inputs)["params"] for name, k in zip(names, keys, strict=True)
            }
        else:
            theta["net"] = net.init(k_net, inputs)["params"]
        if variant == "embedding":
            table = 0.1 * jax.random.normal(k_embedding, (len(names), embedding_dim))
            theta["embedding"] = dict(zip(names, table, strict=True))
        return theta

    @cache
    def net_shapes():
        inputs = jnp.zeros((1, num_inputs))
        return jax.eval_shape(lambda: net.init(jax.random.key(0), inputs))["params"]

    def check_theta(theta):
        _check_theta(
            theta,
            variant=variant,
            base={base.name: dict(base.hyper) for base in bases},
            net=net_shapes(),
            embedding=jax.ShapeDtypeStruct((embedding_dim,), jnp.float32),
        )

    def outputs(theta, names, shared_inputs, layer_inputs) -> Any:
        """Returns the outputs ``[L, 1 + P]`` of the network.

        Args:
          theta: meta-parameters.
          names: names of the L layers.
          shared_inputs: inputs ``[S]`` of all layers.
          layer_inputs: inputs ``[L, F]`` of each layer.
        """
        shared_rows = jnp.broadcast_to(shared_inputs, (len(names), shared_inputs.size))
        inputs = jnp.concatenate([shared_rows, layer_inputs], axis=1)
        if variant == "embedding":
            table = jnp.stack([theta["embedding"][name] for name in names])
            inputs = jnp.concatenate([inputs, table], axis=1)
        if variant == "per_layer":
            nets = jax.tree.map(lambda *w: jnp.stack(w), *[theta["net"][name] for name in names])
            return jax.vmap(lambda w, x: net.apply({"params": w}, x))(nets, inputs)
        if variant == "global":
            inputs = jnp.mean(inputs, axis=0, keepdims=True)
        rows: Any = net.apply({"params": theta["net"]}, inputs)
        return jnp.broadcast_to(rows, (len(names), rows.shape[1]))

    def apply(theta, *, num_steps=None):
        horizon = check_num_steps("l3rs", num_steps)
        check_theta(theta)
        txs = [
            optax.with_extra_args_support(base.make(theta["base"].get(base.name, {})))
            for base in bases
        ]

        def init_fn(params):
            check_float_tree("l3rs", params)
            names, _ = layers_of(layer_names(params), params)
            _check_layers(theta, names, variant)
            num_layers, num_averages = len(names), len(decays)
            floats = _floats(params)
            return L3RSState(
                count=jnp.zeros([], jnp.int32),
                base=tuple(tx.init(floats) for tx in txs),
                norms=jnp.zeros((num_layers, 2, num_averages)) if decays else (),
                loss=jnp.zeros(num_averages) if decays else (),
                lambda_=jnp.zeros(num_layers),
                alpha=jnp.zeros((num_layers, len(bases))),
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
            names, layer_of_leaf = layers_of(layer_names(params), params)
            if len(names) != len(state.lambda_):
                raise ValueError(
                    f"l3rs: got {len(names)} layers for the state of {len(state.lambda_)}; use the "
                    "state of init(params) of the same params."
                )
            if not names:  # `optax.partition` may give a transformation no leaves
                return updates, state._replace(count=add_to_count(state.count))
            grads, weights = _floats(updates), _floats(params)
            value = jnp.asarray(value, jnp.float32)
            grad_norms = _layer_norms(grads, layer_of_leaf, len(names))
            inputs_are_finite = all_finite(value, grad_norms)

            # The directions of the base optimizers.
            directions, base_states = [], []
            for tx, base_state in zip(txs, state.base, strict=True):
                direction, new_base_state = tx.update(
                    grads, base_state, weights, value=value, finite=inputs_are_finite
                )
                directions.append(direction)
                base_states.append(new_base_state)
            direction_norms = jnp.stack(
                [_layer_norms(direction, layer_of_leaf, len(names)) for direction in directions],
                axis=1,
            )  # [L, P]

            # The inputs of the network.
            count = add_to_count(state.count)
            shared_inputs = [
                relative_time(state.count, horizon, TIME_POINTS),
                absolute_time(horizon, TIME_SCALES),
            ]
            layer_inputs = [safe_log(direction_norms)]
            norms, loss = state.norms, state.loss
            if decays:
                weight_norms = _layer_norms(weights, layer_of_leaf, len(names))
                log_norms = safe_log(jnp.stack([weight_norms, grad_norms], axis=1))  # [L, 2]
                norms = ema_update(state.norms, log_norms, gammas)
                loss = ema_update(state.loss, value, gammas)
                layer_inputs = [
                    ema_debias(norms, count, gammas).reshape(len(names), -1),
                    *layer_inputs,
                ]
                shared_inputs = [ema_debias(loss, count, gammas), *shared_inputs]
            out = outputs(
                theta,
                names,
                jnp.concatenate(shared_inputs),
                jnp.concatenate(layer_inputs, axis=1),
            )

            # The step.
            lambda_ = lambda_0 * jnp.exp(out[:, 0])
            alpha = jax.nn.softmax(out[:, 1:], axis=1)
            is_zero = direction_norms == 0
            inverse_norms = jnp.where(is_zero, 0.0, 1.0 / jnp.where(is_zero, 1.0, direction_norms))
            factors = lambda_[:, None] * alpha * inverse_norms  # [L, P]
            is_finite = inputs_are_finite & all_finite(factors)
            new_base_states = tuple(
                new if base.skips else optax.tree.where(is_finite, new, old)
                for base, new, old in zip(bases, base_states, state.base, strict=True)
            )
            # States of bases are chosen above, so they are left out of this choice.
            taken = L3RSState(
                count=count,
                base=(),
                norms=norms,
                loss=loss,
                lambda_=lambda_,
                alpha=alpha,
                skipped=state.skipped,
            )
            skipped = state._replace(count=count, base=(), skipped=add_to_count(state.skipped))
            new_state = optax.tree.where(is_finite, taken, skipped)._replace(base=new_base_states)
            step = _mix(directions, jnp.where(is_finite, factors, 0.0), layer_of_leaf, is_finite)
            return optax.tree.cast_like(step, updates), new_state

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(init, apply)


class LayerNet(nn.Module):
    """An MLP with ReLU whose outputs start at zero, that is, at norm lambda_0 and equal weights.

    Attributes:
      hidden: units of the hidden layers.
      num_outputs: number of outputs.
    """

    hidden: tuple[int, ...]
    num_outputs: int

    @nn.compact
    def __call__(self, x):
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_outputs, kernel_init=nn.initializers.zeros)(x)


def _check_settings(where: str, *, hidden: Any, embedding_dim: Any, lambda_0: Any) -> None:
    if not isinstance(hidden, list | tuple):
        raise ValueError(f"{where}hidden must be a sequence of layer sizes, got {hidden!r}.")
    for units in hidden:
        check_integer(f"{where}hidden: each entry", units, 1)
    check_integer(f"{where}embedding_dim", embedding_dim, 1)
    check_number(f"{where}lambda_0", lambda_0, above=0)


def ema_decays(ema: str | Sequence[float]) -> tuple[float, ...]:
    """The decays of the averages that the argument `ema` of `l3rs` names."""
    if isinstance(ema, str) and ema not in EMA_SETS:
        raise ValueError(f"l3rs: ema must be decays or one of {', '.join(EMA_SETS)}, got {ema!r}.")
    decays = EMA_SETS[ema] if isinstance(ema, str) else tuple(ema)
    for gamma in decays:
        check_number("l3rs: each of the ema decays", gamma, least=0, below=1)
    return decays


################################################################################
# Layers
################################################################################


def layers_of(name_of_leaf: list[str], params: Any) -> tuple[list[str], list[int]]:
    """Groups the leaves of params into layers.

    Args:
      name_of_leaf: the layer name of each leaf, from `layer_names` of `l3rs`.
      params: weights of the optimizee.

    Returns:
      The names of the layers in order of first appearance, and the layer index of every leaf.

    Raises:
      ValueError: when there is not one name per leaf.
    """
    num_leaves = len(jax.tree.leaves(params))
    if len(name_of_leaf) != num_leaves:
        raise ValueError(
            f"l3rs: layer_names gave {len(name_of_leaf)} names for {num_leaves} leaves; give one "
            "per leaf."
        )
    names = list(dict.fromkeys(name_of_leaf))
    return names, [names.index(name) for name in name_of_leaf]


def _floats(tree: Any) -> Any:
    """The leaves as float32 arrays; Python floats too."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def _layer_norms(tree: Any, layer_of_leaf: list[int], num_layers: int) -> jax.Array:
    """Returns the 2-norms ``[L]`` over the leaves of each layer; differentiable at zero."""
    squares = [jnp.zeros([])] * num_layers
    for layer, leaf in zip(layer_of_leaf, jax.tree.leaves(tree), strict=True):
        squares[layer] = squares[layer] + jnp.sum(jnp.square(leaf))
    total = jnp.stack(squares)
    # Not "total > 0", which is False for NaN: NaN must stay NaN, so that the step is skipped.
    is_zero = total == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, total)))


def _mix(
    directions: Sequence[Any],
    factors: Float[Array, "L P"],
    layer_of_leaf: list[int],
    is_finite: jax.Array,
) -> Any:
    """Returns ``sum_p factors[layer, p] * direction_p`` per leaf, or zero unless `is_finite`."""
    leaves = zip(*[jax.tree.leaves(direction) for direction in directions], strict=True)
    mixed = []
    for layer, leaf_directions in zip(layer_of_leaf, leaves, strict=True):
        step = sum(factors[layer, p] * d for p, d in enumerate(leaf_directions))
        mixed.append(jnp.where(is_finite, step, 0.0))
    return jax.tree.unflatten(jax.tree.structure(directions[0]), mixed)


################################################################################
# Checks of theta
################################################################################


def _check_layers(theta: Theta, names: list[str], variant: Variant) -> None:
    """Raises `ValueError` when theta has no part for one of the layers `names`."""
    parts = {"embedding": theta.get("embedding"), "per_layer": theta["net"]}.get(variant)
    if parts is not None and (missing := [name for name in names if name not in parts]):
        raise ValueError(
            f"l3rs: theta was made for layers {sorted(parts)}, but params also has {missing}. "
            'Meta-train on this structure, map names with `layer_names`, or use variant="none".'
        )


def _check_theta(theta: Theta, *, variant: Variant, base: Any, net: Any, embedding: Any) -> None:
    """Raises `ValueError` unless theta consists of such parts, for whatever layers.

    Args:
      theta: meta-parameters.
      variant: see `l3rs`.
      base: hyper-parameters of the base optimizers.
      net: parameters of one network, or their shapes.
      embedding: embedding of one layer, or its shape.
    """
    parts = theta if isinstance(theta, Mapping) else {}
    parts_of_layers = parts.get({"embedding": "embedding", "per_layer": "net"}.get(variant, ""))
    names = parts_of_layers if isinstance(parts_of_layers, Mapping) else ()
    expected = {"base": base, "net": dict.fromkeys(names, net) if variant == "per_layer" else net}
    if variant == "embedding":
        expected["embedding"] = dict.fromkeys(names, embedding)
    check_same_structure("l3rs: theta", expected, theta)
