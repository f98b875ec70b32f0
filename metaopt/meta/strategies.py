"""evosax's distribution-based strategies behind one interface."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from metaopt.core.extras import optional_imports
from metaopt.core.trees import all_finite
from metaopt.core.types import Key, Theta
from metaopt.meta.updates import centered_ranks, strong

# These estimate a gradient from centered ranks, and our meta-optimizer follows it. All others have
# an update rule of their own for the mean (a recombination of the best); most have one for sigma.
GRADIENT = ("ARS", "ASEBO", "ESMC", "GuidedES", "Open_ES", "PGPE")
UNFIT = {
    "PersistentES": "it works on windows of longer runs; use meta.pes",
    "NoiseReuseES": "it works on windows of longer runs; use meta.pes",
    "RandomSearch": "it has no distribution to learn",
    "SV_CMA_ES": "it learns several thetas, but one is asked for",
    "SV_Open_ES": "it learns several thetas, but one is asked for",
}
# The strategies of evosax 0.3.2 except `UNFIT`. evosax is imported late: its import initialises
# JAX's devices, and processes of one training must join before that.
STRATEGIES = (
    "ARS",
    "ASEBO",
    "CMAAnchoredLES",
    "CMA_ES",
    "CR_FM_NES",
    "DES",
    "ESMC",
    "EvoTF_ES",
    "GradientlessDescent",
    "GuidedES",
    "HillClimbing",
    "iAMaLGaM_Full",
    "iAMaLGaM_Univariate",
    "LES",
    "LM_MA_ES",
    "MA_ES",
    "Open_ES",
    "PGPE",
    "Rm_ES",
    "Sep_CMA_ES",
    "SimulatedAnnealing",
    "SimpleES",
    "SNES",
    "xNES",
)


class Strategy(NamedTuple):
    """A strategy of pure functions; `es` is evosax's state, a pytree of arrays.

    Attributes:
      init: ``(key, theta) -> es``.
      ask: ``(key, es, generation) -> (population, es)``; the leaves of the population are those of
        theta with a leading axis [n].
      tell: ``(key, population, losses [n], es) -> es``; minimises losses; NaN and inf rank last.
      theta: ``es -> theta``, the mean of the distribution.
      metrics: ``(before, after) -> dict`` of a generation, from the states before and after `tell`:
        sigma, and grad_norm if the strategy follows a gradient.
    """

    init: Callable[[Key, Theta], Any]
    ask: Callable[[Key, Any, jax.Array], tuple[Theta, Any]]
    tell: Callable[[Key, Theta, jax.Array, Any], Any]
    theta: Callable[[Any], Theta]
    metrics: Callable[[Any, Any], dict[str, jax.Array]]


def strategy(
    name: str,
    theta: Theta,
    *,
    population: int,
    sigma: Callable[[Any], jax.Array],
    optimizer: optax.GradientTransformation,
) -> Strategy:
    """A strategy of evosax.

    A generation without a finite loss, or an update that is not finite, changes nothing.

    Args:
      name: one of `STRATEGIES`.
      theta: an example; only its structure is used, and it may be traced.
      population: candidates per generation.
      sigma: generation -> standard deviation. Strategies that adapt it start at sigma(0).
      optimizer: moves the mean of the strategies in `GRADIENT`.
    """
    with optional_imports("train", needed_by="metaopt.meta.nes"):
        from evosax.algorithms.distribution_based import distribution_based_algorithms

    make: Any = distribution_based_algorithms[name]
    scheduled = "std_schedule" in inspect.signature(make).parameters
    own: dict[str, Any] = {"std_schedule": sigma} if scheduled else {}
    if name in GRADIENT:
        shaping = lambda population, losses, state, params: centered_ranks(losses)
        own |= {"optimizer": optimizer, "fitness_shaping_fn": shaping}
    with jax.ensure_compile_time_eval():  # some strategies read parameters of their own from a file
        evosax = make(population_size=population, solution=_zeros(theta), **own)
        params = evosax.default_params
        if hasattr(params, "std_init") and name != "xNES":  # it would apply the value twice
            params = params.replace(std_init=sigma(0))

    def with_sigma(es, generation):
        return es.replace(std=jnp.broadcast_to(sigma(generation), jnp.shape(es.std)))

    def init(key, theta):
        es = evosax.init(key, theta, params)
        if name.startswith("iAMaLGaM"):  # it adds std to a covariance of its own, at first 1
            es = es.replace(C=es.C * sigma(0) ** 2)
        return strong(with_sigma(es, 0) if hasattr(es, "std") else es)

    def ask(key, es, generation):
        # evosax 0.3.2 reads a schedule before it increments its counter: the value is set here.
        es = with_sigma(es, generation) if scheduled else es
        population, es = evosax.ask(key, es, params)
        return population, strong(es)

    def tell(key, population, losses, es):
        finite = jnp.isfinite(losses)
        told, _ = evosax.tell(key, population, worst_last(losses, finite), es, params)
        usable = jnp.any(finite) & all_finite(told.mean)
        return optax.tree.where(usable, strong(told), es)

    def metrics(asked, told):
        known = {"sigma": jnp.mean(asked.std)} if hasattr(asked, "std") else {}
        if name in GRADIENT:
            known["grad_norm"] = optax.tree.get(told.opt_state, "meta_grad_norm")
        return known

    return Strategy(init, ask, tell, lambda es: evosax.get_mean(es), metrics)


def _zeros(theta: Theta) -> Theta:
    """The structure of `theta`, which may be traced, for evosax."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), theta)


def worst_last(losses: Float[Array, " n"], finite: Bool[Array, " n"]) -> jax.Array:
    """Losses ``[n]`` in which a finite value above all others replaces each non-finite loss.

    It is not inf: strategies that compute means and variances of the losses would become NaN.
    """
    worst = jnp.max(losses, initial=-jnp.inf, where=finite)
    best = jnp.min(losses, initial=jnp.inf, where=finite)
    margin = jnp.maximum(worst - best, jnp.maximum(jnp.abs(worst), 1.0))
    return jnp.where(finite, losses, jnp.where(jnp.any(finite), worst + margin, 0.0))


class Persistent(NamedTuple):
    """evosax's PersistentES; all functions are pure.

    Attributes:
      init: as in `Strategy`.
      ask: as in `Strategy`. Candidates i and i + n/2 of the population ``[n]`` are an antithetic
        pair.
      tell: as in `Strategy`, but losses count by their values; NaN and inf count as the worst
        finite loss.
      forget: ``(es, ended [n]) -> es`` without the noise of particles whose run has ended.
      theta: as in `Strategy`.
      metrics: as in `Strategy`.
    """

    init: Callable[[Key, Theta], Any]
    ask: Callable[[Key, Any, jax.Array], tuple[Theta, Any]]
    tell: Callable[[Key, Theta, jax.Array, Any], Any]
    forget: Callable[[Any, jax.Array], Any]
    theta: Callable[[Any], Theta]
    metrics: Callable[[Any, Any], dict[str, jax.Array]]


def persistent(
    theta: Theta,
    *,
    population: int,
    sigma: Callable[[Any], jax.Array],
    optimizer: optax.GradientTransformation,
    accumulate: bool = True,
    clip_difference: float = 0.0,
) -> Persistent:
    """PersistentES whose particles end their runs at different times (`forget`).

    Args:
      theta: as in `strategy`.
      population: as in `strategy`.
      sigma: as in `strategy`.
      optimizer: as in `strategy`.
      accumulate: False forgets the noise before every window.
      clip_difference: bound on the difference of the losses of an antithetic pair; 0: none.
    """
    with optional_imports("train", needed_by="metaopt.meta.pes"):
        from evosax.algorithms import PersistentES

    population_size = population
    with jax.ensure_compile_time_eval():
        evosax = PersistentES(population_size, _zeros(theta), optimizer)
        params = evosax.default_params.replace(T=1, K=0)  # disable evosax's own truncation

    def init(key, theta):
        return strong(evosax.init(key, theta, params).replace(std=sigma(0)))

    def ask(key, es, generation):
        # The estimate divides all noise by the square of the current sigma. Earlier noise was drawn
        # with another sigma, so it is rescaled.
        now = sigma(generation)
        rescale = (now / es.std) ** 2 if accumulate else 0.0
        es = es.replace(std=now, pert_accum=es.pert_accum * rescale)
        population, es = evosax.ask(key, es, params)
        return population, strong(es)

    def tell(key, population, losses, es):
        finite = jnp.isfinite(losses)
        worst = jnp.max(losses, initial=-jnp.inf, where=finite)
        losses = jnp.where(finite, losses, worst)
        if clip_difference:  # the noise of a pair is antithetic: their common loss cancels
            half = (losses[: population_size // 2] - losses[population_size // 2 :]) / 2
            half = jnp.clip(half, -clip_difference / 2, clip_difference / 2)
            losses = jnp.concatenate([half, -half])
        told, _ = evosax.tell(key, population, losses, es, params)
        usable = jnp.any(finite) & all_finite(told.mean, told.opt_state)
        return optax.tree.where(usable, strong(told.replace(std=es.std)), es)

    def forget(es, ended):
        return es.replace(pert_accum=jnp.where(ended[:, None], 0.0, es.pert_accum))

    def metrics(asked, told):
        grad_norm = optax.tree.get(told.opt_state, "meta_grad_norm")
        return {"sigma": asked.std, "grad_norm": grad_norm}

    return Persistent(init, ask, tell, forget, lambda es: evosax.get_mean(es), metrics)
