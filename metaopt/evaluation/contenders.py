"""Contenders of an evaluation: tuned baselines, learned optimizers, guarded learned optimizers."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optax

from metaopt import guards
from metaopt.core.types import LearnedOptimizer, Params, Theta
from metaopt.evaluation.curves import EvalParams
from metaopt.evaluation.records import Kind
from metaopt.guards.race import Standing
from metaopt.optimizers import ADVERSARIES, L3RS
from metaopt.zoo.exports import Exported

Make = Callable[[int], Any]  # num_steps -> transformation


class Learned(NamedTuple):
    """A learned optimizer with its theta.

    Attributes:
      name: name in tables.
      optimizer: the learned optimizer.
      theta: its meta-parameters.
      fields: fields of its state to record after each window.
      bases: names of the base optimizers of an L3RS, else empty.
    """

    name: str
    optimizer: LearnedOptimizer
    theta: Theta
    fields: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()

    def make(self, num_steps: int) -> Any:
        """The optax transformation for a run of `num_steps` steps."""
        return self.optimizer.apply(self.theta, num_steps=num_steps)


class Contender(NamedTuple):
    """One optimizer of a comparison.

    Attributes:
      name: name in tables.
      kind: baseline, learned or guarded.
      make: ``num_steps -> transformation``.
      fields: fields of its state to record after each window.
      learned: the learned optimizer that it runs, or None.
      guard_name: name of the guard, or empty.
      fallback: name of the guard's fallback in tables, or empty.
      eval_params: see `metaopt.evaluation.curves.evaluate`.
      held_out: whether the guard decides on the validation split (see `curves.evaluate`).
    """

    name: str
    kind: Kind
    make: Make
    fields: tuple[str, ...] = ()
    learned: Learned | None = None
    guard_name: str = ""
    fallback: str = ""
    eval_params: EvalParams | None = None
    held_out: bool = False


# Name -> (learned, fallback transformation, num_steps, window) -> guard.
GUARDS: dict[str, Callable[[Learned, Any, int, int], guards.Guard]] = {
    "gl2o": lambda learned, fallback, k, n: guards.gl2o(learned.make(k), fallback),
    "lgl2o": lambda learned, fallback, k, n: guards.lgl2o(learned.make(k), fallback, n_t=n, n_c=n),
    "race": lambda learned, fallback, k, n: guards.race(learned.make(k), fallback, n_t=n),
    "race-held-out": lambda learned, fallback, k, n: guards.race(
        learned.make(k), fallback, n_t=n, eval_every=n, overrule=1
    ),
    "smg": lambda learned, fallback, k, n: guards.smg(
        learned.optimizer, learned.theta, n_t=n, n_c=n, num_steps=k
    ),
    "amg": lambda learned, fallback, k, n: guards.amg(
        learned.optimizer, learned.theta, n_t=n, n_c=n, num_steps=k
    ),
}


# The race in comparisons with papers, with as many validation mini-batches as training ones: the
# last window alone decides, and the learned optimizer starts again after each window that it lost.
PAPER_RACE: dict[str, Any] = {"smoothing": 0, "margin": 0, "patience": 1, "budget": 1}
PAPER_GUARDS = {
    **GUARDS,
    "race": lambda learned, fallback, k, n: guards.race(
        learned.make(k), fallback, n_t=n, n_c=n, **PAPER_RACE
    ),
}
HELD_OUT = ("race-held-out",)  # given the validation split to decide on
WITHOUT_FALLBACK = ("smg", "amg")  # their fallback is a descent step in params and theta


def baseline(label: str, make: Make) -> Contender:
    """A tuned hand-crafted optimizer."""
    return Contender(name=label, kind="baseline", make=make)


def plain(learned: Learned) -> Contender:
    """A learned optimizer without a guard."""
    return Contender(
        name=learned.name,
        kind="learned",
        make=learned.make,
        fields=learned.fields,
        learned=learned,
    )


def guarded(
    learned: Learned,
    guard: str,
    fallback: str,
    make: Make,
    window: int,
    *,
    as_in_papers: bool = False,
) -> Contender:
    """A learned optimizer under a guard.

    Args:
      learned: the learned optimizer.
      guard: name of the guard in `GUARDS`.
      fallback: name of the fallback in tables.
      make: the fallback, ``num_steps -> transformation``.
      window: training mini-batches per window of the guard, and validation ones where it takes
        them.
      as_in_papers: the guard is given additional mini-batches to validate on, and it is
        made as in `PAPER_GUARDS`. Otherwise it takes the stream as users run it.
    """
    held_out = guard in HELD_OUT

    def make_guard(num_steps: int) -> Any:
        table = PAPER_GUARDS if as_in_papers else GUARDS
        tx = table[guard](learned, make(num_steps), num_steps, window)
        return guards.in_windows(tx) if as_in_papers else tx

    eval_params = getattr(make, "eval_params", None)  # of a tuned baseline
    if guard in WITHOUT_FALLBACK:
        fallback, eval_params = "", None
    parts = [learned.name, fallback] if fallback else [learned.name]
    return Contender(
        name=f"{guard.upper()}({', '.join(parts)})",
        kind="guarded",
        make=make_guard,
        fields=("accepted", "loss_evals") if held_out else ("accepted",),
        learned=learned,
        guard_name=guard,
        fallback=fallback,
        eval_params=eval_params and _while_it_leads(eval_params),
        held_out=held_out,
    )


def _while_it_leads(eval_params: EvalParams) -> EvalParams:
    """`eval_params` of a guard around a fallback that has one.

    While the guard holds the fallback's point, it is judged where the fallback is; else at its
    params.
    """

    def of_guard(state: Any, params: Params) -> Params:
        memory = getattr(state, "memory", state)  # gl2o has no windows, and one state
        if isinstance(memory, Standing):  # race: the leader, unless it has broken since
            work = state.work.value
            held = (memory.leader > 0) | work.broken
            fallback = work.runners[1].state
        else:
            held, fallback = memory.info.winner == 1, memory.fallback
        return optax.tree.where(held, eval_params(fallback, params), params)

    return of_guard


def from_export(name: str, export: Exported) -> Learned:
    """An exported optimizer; of an L3RS, what its lambda and alpha stand for."""
    if not isinstance(export.settings, L3RS):
        # Without the callbacks of warnings, programs can be cached. Runs end at their horizon.
        fields = dataclasses.fields(export.settings)
        quiet = {field.name: False for field in fields if field.name.startswith("warn_")}
        optimizer = dataclasses.replace(export.settings, **quiet).build()
        return Learned(name, optimizer, export.theta)
    return Learned(
        name,
        export.optimizer,
        export.theta,
        fields=("lambda_", "alpha"),
        bases=export.settings.base,
    )


def adversary(name: str) -> Learned:
    """One of `metaopt.optimizers.ADVERSARIES`."""
    return Learned(name, ADVERSARIES[name], theta={})


def folder_name(path: Path) -> str:
    """The name of a run in tables: the name of its folder, not of the ``export`` inside it."""
    path = Path(path).absolute()
    return path.parent.name if path.name == "export" else path.name
