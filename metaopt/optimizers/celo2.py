"""Celo2: a learned direction of fixed size, to be scaled by an ordinary learning rate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from metaopt.core.checks import check_choice, check_fields, check_number
from metaopt.core.meshes import with_auto_axes
from metaopt.core.trees import (
    add_to_count,
    all_finite,
    check_float_tree,
    check_same_structure,
    path_name,
    with_nodes_of,
)
from metaopt.core.types import LearnedOptimizer, Params, Theta, transformation
from metaopt.optimizers import velo_rule as rule
from metaopt.optimizers.features import check_num_steps, check_params, warn_of_frozen_leaves
from metaopt.optimizers.handcrafted import cosine_decay
from metaopt.optimizers.layouts import celo2_shapes, check_theta, init_theta
from metaopt.optimizers.velo_features import Decays
from metaopt.optimizers.velo_networks import mlp_layers

Schedule: TypeAlias = Literal["constant", "cosine"]
_RULE = rule.Rule(decays=Decays(v=0.95), v_eps=1e-8, eps=1e-9, per_matrix=True)
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

################################################################################
# The direction
################################################################################


class Celo2State(NamedTuple):
    """State of Celo2's direction, float32 unless said otherwise.

    Attributes:
      t: int32 ``[]``, number of updates.
      skipped: int32 ``[]``, number of them skipped because an input was not finite.
      momenta: mean gradients for the decays (0.9, 0.99, 0.999), each like params.
      v: mean squared gradient, decay 0.95, like params.
      factored: like params, with a `velo_features.Factored` in place of each leaf.
    """

    t: Int[Array, ""]
    skipped: Int[Array, ""]
    momenta: tuple[Any, ...]
    v: Any
    factored: Any


def celo2(orthogonalize: bool = True, *, warn_frozen: bool = True) -> LearnedOptimizer:
    r"""Celo2: a small MLP gives a direction of root mean square 1 for each matrix.

    .. math:: u_t = \mathrm{orth}(\mathrm{MLP}(z_t)), \qquad
       \hat u_t = u_t / \sqrt{\overline{u_t^2} + 10^{-9}}

    where :math:`z` are 30 columns per parameter (gradient, parameter, momenta, second moments),
    each divided by its root mean square, orth is five iterations of Newton and Schulz, and means
    are over the last two axes. Leaves with fewer than two axes have 15 columns, and no orth.

    It is a direction, as those of optax's ``scale_by_*``. Chain it with a weight decay and a
    learning rate; `celo2_adamw` is the form that its authors use::

        optax.chain(
            optimizers.celo2().apply(theta),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(1e-3),
        )

    The computation is in float32; updates have the dtype of each gradient leaf. An update whose
    gradient or parameters are not finite is zero and changes no memory; ``state.skipped`` counts
    it.

    Args:
      orthogonalize: whether to orthogonalize matrices. False is Celo2-base.
      warn_frozen: warn once of leaves whose gradient has been zero since the start, by a host
        callback in the compiled program. Use False to export or cache the program, which a
        callback prevents.

    Returns:
      A `LearnedOptimizer` without a horizon. Its `update` needs `params`, and ignores all extra
      args. The state holds about 4 floats per parameter.

    Raises:
      ValueError: at `apply`, when theta is of another optimizer; at `update`, when `params` is
        missing or trees do not fit.

    .. warning:: A matrix whose gradients are all zero moves, too. Freeze unused leaves outside,
      with `optax.masked` or `optax.partition`.

    References:
      Moudgil et al., [Celo2](https://github.com/amoudgl/celo2), 2026

      docs/optimizers/celo2.md has every formula, and lists what differs from the published code.
    """

    def init(key, params):
        del params  # one theta serves trees of any structure
        return init_theta(key, celo2_shapes())

    def apply(theta, *, num_steps=None):
        del num_steps  # this optimizer does not know its horizon
        check_theta("celo2", theta)
        layers = mlp_layers(optax.tree.cast(theta, jnp.float32))

        def init_fn(params):
            zero = jnp.zeros((), jnp.int32)
            return Celo2State(t=zero, skipped=zero, **rule.init_accumulators("celo2", params))

        def update_fn(updates, state: Celo2State, params=None, **extra_args):
            del extra_args
            check_params("celo2", params)
            stacks = rule.stack("celo2", updates, state, params)
            if warn_frozen:
                warn_of_frozen_leaves(
                    "celo2",
                    theta,
                    state.t,
                    state.skipped,
                    params,
                    lambda: rule.are_frozen(state),
                )
            is_finite = jax.lax.optimization_barrier(rule.are_finite(_RULE, stacks))

            def step_fn(tensor, g):
                return _direction(layers, tensor, g, orthogonalize)

            steps, stacks = rule.step_stacks(_RULE, step_fn, stacks, is_finite)
            deltas, state = rule.unstack(steps, stacks, updates, state, params)
            skipped = add_to_count(state.skipped, ~is_finite)
            return deltas, state._replace(t=add_to_count(state.t), skipped=skipped)

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(init, apply)


def _direction(layers, tensor, g, orthogonalize: bool) -> jax.Array:
    if g.ndim < 2:  # groups 9 to 13 do not exist
        (w0, b0), *rest = layers
        layers = [(w0.at[15:].set(0.0), b0), *rest]
    u, *_ = rule.outputs(_RULE, layers, tensor, g)
    if orthogonalize and g.ndim >= 2:
        u = with_auto_axes(newton_schulz, u, like=u)  # products of a matrix with itself
    axes = tuple(range(max(0, g.ndim - 2), g.ndim))
    return u * jax.lax.rsqrt(1e-9 + jnp.mean(jnp.square(u), axis=axes, keepdims=True))


def newton_schulz(u: Float[Array, "... rows cols"]) -> Float[Array, "... rows cols"]:
    """Returns matrices with the singular vectors of `u` and singular values near 1.

    Five iterations of Newton and Schulz, as in Muon.

    Args:
      u: matrices ``[..., rows, cols]``.

    References:
      Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/), 2024
    """
    tall = u.shape[-2] > u.shape[-1]
    x = jnp.swapaxes(u, -2, -1) if tall else u
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ jnp.swapaxes(x, -2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -2, -1) if tall else x


def imitate_muon(theta: Theta, mix: tuple[float, float, float] = (0.5, 0.5, 0.0)) -> Theta:
    """A start of meta-training: theta with which Celo2 orthogonalizes momenta, as Muon does.

    Two units of each hidden layer carry the mean of the normalised momenta, its positive and its
    negative part; the output is their difference, and does not depend on the other units. These
    keep the weights of `theta`, so that meta-training can make use of them.

    Args:
      theta: of `celo2`, e.g. a random one.
      mix: weights of the momenta with decays 0.9, 0.99 and 0.999.

    Returns:
      The theta.
    """
    check_theta("celo2", theta)
    bank = {name: jnp.asarray(leaf) for name, leaf in theta["ff_mod_stack"]["~"].items()}
    signs = jnp.array([1.0, -1.0])
    for name, leaf in bank.items():
        if name.startswith("w0__"):
            carried = jnp.outer(jnp.array(mix), signs) if name == "w0__3" else 0.0
            bank[name] = leaf.at[:, :2].set(carried)
    bank["w1"] = bank["w1"].at[:, :2].set(0.0).at[:2, :2].set(jnp.eye(2))
    bank["w2"] = bank["w2"].at[:, 0].set(0.0).at[:2, 0].set(signs)
    for name in ("b0", "b1"):
        bank[name] = bank[name].at[:2].set(0.0)
    bank["b2"] = bank["b2"].at[0].set(0.0)
    return {"ff_mod_stack": {"~": bank}}


################################################################################
# The optimizer
################################################################################


@dataclass(frozen=True, kw_only=True)
class Celo2:
    """Celo2 as an optimizer: its direction for matrices, AdamW for all else.

    Attributes:
      orthogonalize: whether to orthogonalize matrices.
      lr: learning rate.
      weight_decay: decay of all parameters, in units of the learning rate.
      adam_factor: learning rate of AdamW, as a multiple of `lr`.
      schedule: constant, or cosine, where both rates fall to zero at the horizon.
      warn_frozen: warn once of leaves whose gradient has been zero since the start.
    """

    name: ClassVar[str] = "celo2"
    orthogonalize: bool = True
    lr: float = 1e-3
    weight_decay: float = 0.0
    adam_factor: float = 20.0
    schedule: Schedule = "constant"
    warn_frozen: bool = True

    def __post_init__(self):
        check_fields(self)
        _check_settings("Celo2.", self.lr, self.weight_decay, self.adam_factor)

    def build(self) -> LearnedOptimizer:
        """The optimizer with these settings."""
        return celo2_adamw(
            self.lr,
            orthogonalize=self.orthogonalize,
            weight_decay=self.weight_decay,
            adam_factor=self.adam_factor,
            schedule=self.schedule,
            warn_frozen=self.warn_frozen,
        )


class Celo2AdamWState(NamedTuple):
    """State of `celo2_adamw`.

    Attributes:
      skipped: int32 ``[]``, number of updates skipped because an input was not finite.
      inner: states of both transformations.
    """

    skipped: Int[Array, ""]
    inner: Any


def celo2_labels(params: Params) -> Any:
    """Returns "adam" for leaves below two axes and for embeddings, "celo2" for all others.

    A leaf is an embedding if its path contains "embed", in any case.

    Args:
      params: the tree.
    """

    def label(path, leaf):
        is_adam = jnp.ndim(leaf) < 2 or "embed" in path_name(path).lower()
        return "adam" if is_adam else "celo2"

    return jax.tree_util.tree_map_with_path(label, params)


def celo2_adamw(
    lr: optax.ScalarOrSchedule = 1e-3,
    *,
    orthogonalize: bool = True,
    weight_decay: float = 0.0,
    adam_factor: float = 20.0,
    schedule: Schedule = "constant",
    labels: Callable[[Params], Any] = celo2_labels,
    warn_frozen: bool = True,
) -> LearnedOptimizer:
    """Celo2 as its authors use it: the direction of `celo2` for matrices, AdamW for all else.

    An update whose gradient or parameters are not finite is zero and changes no memory;
    ``state.skipped`` counts it.

    Args:
      lr: learning rate, or a schedule of it: count of updates -> rate.
      orthogonalize: see `celo2`.
      weight_decay: decay of all parameters, in units of the learning rate.
      adam_factor: learning rate of AdamW (decays 0.9 and 0.95), as a multiple of `lr`.
      schedule: "cosine" multiplies `lr` by half a cosine that falls from 1 to 0 over the run, whose
        number of updates `apply` then needs: ``apply(theta, num_steps=...)``.
      labels: function of params that returns a tree with "celo2" or "adam" for each leaf.
      warn_frozen: see `celo2`. AdamW does not move a leaf without a gradient, but for its decay.

    Returns:
      A `LearnedOptimizer` with the theta of `celo2`. Its `update` needs `params`.

    Raises:
      ValueError: when a number is out of range; further as `celo2`.

    References:
      Moudgil et al., [Celo2](https://github.com/amoudgl/celo2), 2026

      docs/optimizers/celo2.md
    """
    _check_settings("celo2_adamw: ", lr, weight_decay, adam_factor)
    check_choice("celo2_adamw: schedule", schedule, ("constant", "cosine"))
    direction = celo2(orthogonalize, warn_frozen=warn_frozen)

    def rate_of(num_steps) -> optax.ScalarOrSchedule:
        if schedule == "constant":
            return lr
        factor = cosine_decay(1.0, check_num_steps("celo2_adamw", num_steps))
        return lambda count: factor(count) * (lr(count) if callable(lr) else lr)

    def apply(theta: Theta, *, num_steps=None):
        rate = rate_of(num_steps)

        def adam_rate(count):
            return adam_factor * (rate(count) if callable(rate) else rate)

        inner = optax.partition(
            {
                "celo2": optax.chain(
                    direction.apply(theta),
                    optax.add_decayed_weights(weight_decay),
                    optax.scale_by_learning_rate(rate),
                ),
                "adam": optax.adamw(
                    adam_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay
                ),
            },
            labels,
        )

        def init_fn(params):
            check_float_tree("celo2_adamw", params)
            return Celo2AdamWState(skipped=jnp.zeros((), jnp.int32), inner=inner.init(params))

        def update_fn(updates, state: Celo2AdamWState, params=None, **extra_args):
            del extra_args
            check_params("celo2_adamw", params)
            check_same_structure("celo2_adamw: updates", params, updates)
            state = with_nodes_of(lambda: init_fn(params), state)
            is_finite = all_finite(updates, params)
            grads = jax.tree.map(lambda g: jnp.where(is_finite, g, 0.0).astype(g.dtype), updates)
            deltas, moved = inner.update(grads, state.inner, params)
            deltas = jax.tree.map(lambda d: jnp.where(is_finite, d, 0.0).astype(d.dtype), deltas)
            return deltas, Celo2AdamWState(
                skipped=add_to_count(state.skipped, ~is_finite),
                inner=optax.tree.where(is_finite, moved, state.inner),
            )

        return transformation(init_fn, update_fn)

    return LearnedOptimizer(direction.init, apply)


def _check_settings(where: str, lr: Any, weight_decay: Any, adam_factor: Any) -> None:
    if not callable(lr):
        check_number(f"{where}lr", lr, least=0)
    check_number(f"{where}weight_decay", weight_decay, least=0)
    check_number(f"{where}adam_factor", adam_factor, least=0)
