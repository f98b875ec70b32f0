"""Base optimizers that L3RS mixes: directions of unit learning rate with meta-learned constants."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.core.checks import short


class Base(NamedTuple):
    """A base optimizer.

    Attributes:
      name: unique among the bases of one L3RS.
      hyper: initial values of its unconstrained hyper-parameters (see `make`).
      make: hyper-parameters -> transformation with learning rate 1, whose output is added.
      skips: its `update` takes ``finite``, whether loss and gradient are, and keeps its state where
        they are not. L3RS does that for others, but only when it knows the directions: XLA then
        holds two states, and copies.
    """

    name: str
    hyper: Mapping[str, float]
    make: Callable[[Mapping[str, jax.Array]], optax.GradientTransformation]
    skips: bool = False


def _hyper(b1: float, b2: float, eps: float | None = None) -> dict[str, float]:
    """Decays as logits, eps as a logarithm: every real number stands for a legal value."""
    logit = lambda p: float(np.log(p) - np.log1p(-p))
    hyper = {"logit_b1": logit(b1), "logit_b2": logit(b2)}
    return hyper if eps is None else {**hyper, "log_eps": float(np.log(eps))}


def _args(h: Mapping[str, jax.Array]) -> dict[str, Any]:
    args = {"b1": jax.nn.sigmoid(h["logit_b1"]), "b2": jax.nn.sigmoid(h["logit_b2"])}
    return {**args, "eps": jnp.exp(h["log_eps"])} if "log_eps" in h else args


def _downhill(updates, params):
    """As ``optax.sgd(1.0)``, which multiplies by -1: of a negation XLA sees that its norm is the
    gradient's, and computes it once. A third of what L3RS adds to the time of a population.
    """
    del params
    return jax.tree.map(jnp.negative, updates)


def _away_from_zero(updates, params):
    del updates
    return optax.tree.scale(-1.0, params)


# sqrt has no derivative at 0, where the second moment of a coordinate whose gradient was always 0
# (a dead pixel) is: back-propagation to b2 would be NaN. Far below eps^2, it changes no step.
ROOT = 1e-30


def _scale_by_adam(
    b1: jax.Array, b2: jax.Array, eps: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """As `optax.scale_by_adam`, for populations: skips steps (see `Base`), and divides once per
    coordinate. Of optax's three divisions XLA makes one too, but not in programs of several
    devices. Together a tenth of the time of a population, and a seventh there.

    Squares are not ``g**2``, which L3RS needs for the gradient's norm as well: XLA would compute
    them once, and write them to memory for both.
    """

    def init(params):
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(updates, state, params=None, *, finite=True, **extra_args):
        del params, extra_args
        count = optax.safe_increment(state.count)
        rise1, rise2 = 1 / (1 - b1**count), 1 / (1 - b2**count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = jax.tree.map(lambda g, v: (1 - b2) * g * g + b2 * v, updates, state.nu)
        state = optax.tree.where(finite, optax.ScaleByAdamState(count, mu, nu), state)
        step = lambda m, v: m * rise1 / (jnp.sqrt(v * rise2 + ROOT) + eps)
        return jax.tree.map(step, state.mu, state.nu), state

    return optax.GradientTransformationExtraArgs(init, update)


# Constants: optax's defaults; weight decay inside LAMB and Lion is 0, it is a base of its own.
BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base("sgd", {}, lambda h: optax.stateless(_downhill)),
        Base(
            "adam",
            _hyper(0.9, 0.999, 1e-8),
            lambda h: optax.chain(_scale_by_adam(**_args(h)), optax.scale(-1.0)),
            skips=True,
        ),
        Base("adamax", _hyper(0.9, 0.999, 1e-8), lambda h: optax.adamax(1.0, **_args(h))),
        Base("lion", _hyper(0.9, 0.99), lambda h: optax.lion(1.0, **_args(h), weight_decay=0.0)),
        Base(
            "lamb",
            _hyper(0.9, 0.999, 1e-6),
            lambda h: optax.chain(
                _scale_by_adam(**_args(h)), optax.scale_by_trust_ratio(), optax.scale(-1.0)
            ),
            skips=True,
        ),
        Base("weight_decay", {}, lambda h: optax.stateless(_away_from_zero)),
    )
}


def resolve(bases: Sequence[str | Base | optax.GradientTransformation]) -> tuple[Base, ...]:
    """Names, `Base`s and plain optax transformations (nothing meta-learned) as `Base`s."""
    if not isinstance(bases, list | tuple) or not bases:
        raise ValueError(f"l3rs: base must be a sequence of at least one optimizer, got {bases!r}.")
    resolved = []
    for index, base in enumerate(bases):
        if isinstance(base, str):
            if base not in BASES:
                raise ValueError(f"l3rs: unknown base {base!r}; known are {', '.join(BASES)}.")
            base = BASES[base]
        elif not isinstance(base, Base):
            if not isinstance(base, optax.GradientTransformation):
                raise ValueError(
                    f"l3rs: base {index} must be a name, a Base or an optax transformation, got "
                    f"{short(base)}."
                )
            tx = base
            base = Base(f"user_{index}", {}, lambda h, tx=tx: tx)
        resolved.append(base)
    names = [base.name for base in resolved]
    if len(set(names)) < len(names):
        raise ValueError(f"l3rs: base names must differ, got {', '.join(names)}.")
    return tuple(resolved)
