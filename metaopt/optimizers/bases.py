"""Base optimizers that L3RS mixes: directions of learning rate 1 with meta-learned constants."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt.core import cpu
from metaopt.core.checks import show


class Base(NamedTuple):
    """A base optimizer.

    Attributes:
      name: name of the base, unique in one L3RS.
      hyper: initial values of the unconstrained hyper-parameters that `make` takes.
      make: ``hyper-parameters -> transformation`` with learning rate 1, whose output is added.
      skips: whether `update` takes the extra arg ``finite`` (whether loss and gradient are finite)
        and keeps its state when that is False. L3RS does so for other bases, but only after it
        knows all directions, when XLA holds two states at once and copies.
      rates: learning rates between which a search looks for the best one of the base alone, or
        None if it is no optimizer by itself.
    """

    name: str
    hyper: Mapping[str, float]
    make: Callable[[Mapping[str, jax.Array]], optax.GradientTransformation]
    skips: bool = False
    rates: tuple[float, float] | None = None


def resolve(bases: Sequence[str | Base | optax.GradientTransformation]) -> tuple[Base, ...]:
    """Returns base optimizers as `Base`s.

    Args:
      bases: names in `BASES`, `Base`s, or optax transformations, of which nothing is meta-learned.

    Raises:
      ValueError: when there is none, one is of another type, a name is unknown, or two share one.
    """
    if not isinstance(bases, list | tuple) or not bases:
        raise ValueError(f"l3rs: base must be a sequence of at least one optimizer, got {bases!r}.")
    resolved = [_resolve_one(index, base) for index, base in enumerate(bases)]
    names = [base.name for base in resolved]
    if len(set(names)) < len(names):
        raise ValueError(f"l3rs: base names must differ, got {', '.join(names)}.")
    return tuple(resolved)


def _resolve_one(index: int, base: Any) -> Base:
    if isinstance(base, Base):
        return base
    if isinstance(base, str):
        if base not in BASES:
            raise ValueError(f"l3rs: unknown base {base!r}; known are {', '.join(BASES)}.")
        return BASES[base]
    if isinstance(base, optax.GradientTransformation):
        return Base(name=f"user_{index}", hyper={}, make=lambda hyper: base)
    raise ValueError(
        f"l3rs: base {index} must be a name, a Base or an optax transformation, got {show(base)}."
    )


def _logit(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


def _hyper(b1: float, b2: float, eps: float | None = None) -> dict[str, float]:
    """Returns decays as logits and eps as a logarithm, so that every real number is legal."""
    hyper = {"logit_b1": _logit(b1), "logit_b2": _logit(b2)}
    if eps is not None:
        hyper["log_eps"] = float(np.log(eps))
    return hyper


def constants(hyper: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Returns the arguments b1, b2 and, if it is there, eps. The inverse of `_hyper`."""
    constants = {
        "b1": jax.nn.sigmoid(hyper["logit_b1"]),
        "b2": jax.nn.sigmoid(hyper["logit_b2"]),
    }
    if "log_eps" in hyper:
        constants["eps"] = jnp.exp(hyper["log_eps"])
    return constants


def _negated_params() -> optax.GradientTransformation:
    """Steps from the params towards zero."""
    return optax.stateless(lambda updates, params: optax.tree.scale(-1.0, params))


def _adam(hyper: Mapping[str, jax.Array]) -> optax.GradientTransformation:
    return optax.chain(cpu.scale_by_adam(**constants(hyper)), optax.scale(-1.0))


def _lamb(hyper: Mapping[str, jax.Array]) -> optax.GradientTransformation:
    return optax.chain(
        cpu.scale_by_adam(**constants(hyper)), optax.scale_by_trust_ratio(), optax.scale(-1.0)
    )


def muon_axes(params: Any) -> Any:
    """How Muon makes matrices of the leaves: all axes but the last are one, that of inputs.

    Kernels of convolutions, too, are matrices then, as in the original Muon; by default optax takes
    leaves of two axes only. Leaves with fewer axes are None, and left to Adam.

    Args:
      params: the tree.
    """
    dims = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(
        lambda x: dims(tuple(range(x.ndim - 1)), x.ndim - 1) if x.ndim > 1 else None, params
    )


def _muon(hyper: Mapping[str, jax.Array]) -> optax.GradientTransformation:
    """Muon on leaves of several axes, of which the last is that of outputs, and Adam on others."""
    # The root has a derivative where a gradient is always 0.
    return optax.contrib.muon(
        1.0,
        beta=jax.nn.sigmoid(hyper["logit_beta"]),
        adam_b1=jax.nn.sigmoid(hyper["logit_b1"]),
        adam_b2=jax.nn.sigmoid(hyper["logit_b2"]),
        adam_eps_root=1e-16,
        muon_weight_dimension_numbers=muon_axes,
    )


# Initial constants are optax's defaults. The weight decay inside LAMB and Lion is 0, since weight
# decay is a base of its own.
BASES: dict[str, Base] = {
    "sgd": Base("sgd", hyper={}, make=lambda hyper: cpu.negated_gradient(), rates=(0.01, 3.0)),
    "adam": Base("adam", hyper=_hyper(0.9, 0.999, 1e-8), make=_adam, skips=True, rates=(1e-4, 0.1)),
    "adamax": Base(
        "adamax",
        hyper=_hyper(0.9, 0.999, 1e-8),
        make=lambda hyper: optax.adamax(1.0, **constants(hyper)),
        rates=(1e-4, 0.1),
    ),
    "lion": Base(
        "lion",
        hyper=_hyper(0.9, 0.99),
        make=lambda hyper: optax.lion(1.0, **constants(hyper), weight_decay=0.0),
        rates=(1e-5, 0.01),
    ),
    "lamb": Base("lamb", hyper=_hyper(0.9, 0.999, 1e-6), make=_lamb, skips=True, rates=(1e-3, 0.3)),
    "muon": Base(
        "muon",
        hyper={"logit_beta": _logit(0.95), **_hyper(0.9, 0.999)},
        make=_muon,
        rates=(1e-3, 0.3),
    ),
    "weight_decay": Base("weight_decay", hyper={}, make=lambda hyper: _negated_params()),
}
