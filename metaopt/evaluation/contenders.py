"""What an evaluation compares: tuned baselines, learned optimizers, guarded learned optimizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metaopt import guards
from metaopt.core.rollouts import windowed
from metaopt.core.types import LearnedOptimizer, Theta
from metaopt.evaluation.records import Kind
from metaopt.optimizers import ADVERSARIES, L3RS
from metaopt.zoo.exports import Exported

Make = Callable[[int], Any]  # num_steps -> transformation


class Learned(NamedTuple):
    """A learned optimizer with its theta.

    Attributes:
      name: in tables.
      optimizer, theta: the optimizer.
      fields: of its state to record.
      bases: of an L3RS: see `CurveRecord`.
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
      name: in tables.
      kind: see `CurveRecord`.
      make: ``num_steps -> transformation``.
      guard: `make` gives a window form that counts its gradients.
      fields: of its state to record.
      learned, guard_name, fallback: names of its parts, or empty.
    """

    name: str
    kind: Kind
    make: Make
    guard: bool = False
    fields: tuple[str, ...] = ()
    learned: Learned | None = None
    guard_name: str = ""
    fallback: str = ""


# name -> (learned, fallback transformation, num_steps, window) -> guard in window form.
GUARDS: dict[str, Callable[[Learned, Any, int, int], Any]] = {
    "gl2o": lambda learned, fallback, k, n: windowed(guards.gl2o(learned.make(k), fallback)),
    "lgl2o": lambda learned, fallback, k, n: guards.lgl2o(learned.make(k), fallback, n_t=n, n_c=n),
    "race": lambda learned, fallback, k, n: guards.race(learned.make(k), fallback, n_t=n, n_c=n),
    "smg": lambda learned, fallback, k, n: guards.smg(
        learned.optimizer, learned.theta, n_t=n, n_c=n, num_steps=k
    ),
    "amg": lambda learned, fallback, k, n: guards.amg(
        learned.optimizer, learned.theta, n_t=n, n_c=n, num_steps=k
    ),
}
HAVE_NO_FALLBACK = ("smg", "amg")  # they descend themselves, in params and theta


def baseline(label: str, make: Make) -> Contender:
    """A tuned hand-crafted optimizer."""
    return Contender(label, "baseline", make)


def plain(learned: Learned) -> Contender:
    """A learned optimizer as it is."""
    return Contender(learned.name, "learned", learned.make, fields=learned.fields, learned=learned)


def guarded(learned: Learned, guard: str, fallback: str, make: Make, window: int) -> Contender:
    """A learned optimizer under a guard; `fallback` is what tables call ``make(num_steps)``."""
    build = lambda num_steps: GUARDS[guard](learned, make(num_steps), num_steps, window)
    fallback = "" if guard in HAVE_NO_FALLBACK else fallback
    name = f"{guard.upper()}({', '.join(filter(None, (learned.name, fallback)))})"
    return Contender(
        *(name, "guarded", build, True, ("accepted",)),
        learned=learned,
        guard_name=guard,
        fallback=fallback,
    )


def from_export(name: str, export: Exported) -> Learned:
    """An exported optimizer; of an L3RS, what its lambda and alpha stand for."""
    if not isinstance(export.settings, L3RS):
        return Learned(name, export.optimizer, export.theta)
    return Learned(
        name,
        export.optimizer,
        export.theta,
        fields=("lambda_", "alpha"),
        bases=export.settings.base,
    )


def adversary(name: str) -> Learned:
    """One of `metaopt.optimizers.ADVERSARIES`."""
    return Learned(name, ADVERSARIES[name], {})


def folder_name(path: Path) -> str:
    """The name of a run in tables: its folder, not the ``export`` inside it."""
    path = Path(path).absolute()
    return path.parent.name if path.name == "export" else path.name
