"""Hand-crafted optimizers, and the grids they are tuned on."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metaopt import optimizers
from metaopt.core.checks import check_known
from metaopt.core.named import load_named
from metaopt.core.trees import path_name
from metaopt.core.types import Params
from metaopt.evaluation.curves import Adjustable, EvalParams
from metaopt.optimizers.bases import muon_axes

# {"schedule": name, **arguments of the schedule, **arguments of the transformation}. The rate "lr"
# may be {group of leaves: rate}, see `groups_of`.
Point = Mapping[str, Any]
ARGUMENTS = ("weight_decay",)  # those of a point that the transformation takes, not the schedule
WARMUP, SHORT_WARMUP = 0.1, 0.05  # shares of the run
MOST_GROUPS = 8


def _warmup_cosine(num_steps: int, lr: float) -> optax.Schedule:
    steps = _warmup_steps(WARMUP, num_steps)
    return optax.warmup_cosine_decay_schedule(0.0, lr, steps, num_steps)


def _warmup_constant(num_steps: int, lr: float) -> optax.Schedule:
    return optax.warmup_constant_schedule(0.0, lr, _warmup_steps(SHORT_WARMUP, num_steps))


def _warmup_steps(share: float, num_steps: int) -> int:
    return min(max(round(share * num_steps), 1), num_steps - 1)


# Name -> (num_steps, **arguments) -> schedule of the learning rate.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": lambda num_steps, lr: optax.constant_schedule(lr),
    "cosine": lambda num_steps, lr: optimizers.cosine_decay(lr, num_steps),
    "power": lambda num_steps, lr, tau: optimizers.power_decay(lr, tau),
    "warmup_cosine": _warmup_cosine,
    "warmup_constant": _warmup_constant,
}


class Baseline(NamedTuple):
    """A hand-crafted optimizer and the grid it is tuned on.

    Attributes:
      label: name in tables.
      make: ``(schedule, **arguments) -> transformation``; a schedule maps the step count to a
        learning rate. The arguments are those of `ARGUMENTS` that the points of the grid have; they
        may be traced.
      grid: points of the grid search.
      head_only: whether only the read-out layer is trained (fine-tuning).
      extends: whether the grid is extended where the best point has its lowest or highest rate (see
        `metaopt.evaluation.tuning`). The grids of papers are not.
      draws: number of points, drawn at random around the best point of the grid, that have a rate
        for each group of leaves; not with `head_only`.
      eval_params: ``(state, params) -> params`` at which runs are judged, where these are not the
        params that gradients are taken at; not with `head_only`.
    """

    label: str
    make: Callable[..., optax.GradientTransformation]
    grid: tuple[Point, ...]
    head_only: bool = False
    extends: bool = True
    draws: int = 0
    eval_params: EvalParams | None = None


def named(name: str) -> Baseline:
    """The baseline `name`, or a user's own.

    Args:
      name: a name in `BASELINES`, or ``package.module:attribute`` of a `Baseline` or of a function
        ``schedule -> transformation``, as `optax.adam` is. A function is tuned on Adam's grid.

    Raises:
      ValueError: the name is unknown, or the user's module fails or holds something else.
    """
    if ":" not in name:
        check_known("baseline", name, BASELINES)
        return BASELINES[name]
    made: Any = load_named("baseline", name)
    if isinstance(made, Baseline):
        return made
    if not callable(made):
        raise ValueError(
            f"baseline {name!r} must be a Baseline or a function schedule -> transformation, got "
            f"a {type(made).__name__}."
        )
    make: Any = made
    return Baseline(name.rpartition(":")[2], make, points(_BOTH, lr=_RATES))


def points(schedules: tuple[str, ...], **arguments: tuple[float, ...]) -> tuple[Point, ...]:
    """Product of schedules and their arguments, e.g. ``points(("constant",), lr=(0.1, 0.3))``."""
    product: list[dict[str, Any]] = [{"schedule": schedule} for schedule in schedules]
    for name, values in arguments.items():
        product = [{**point, name: value} for point in product for value in values]
    return tuple(product)


_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_BOTH = ("constant", "cosine")
_ALL = (*_BOTH, "warmup_cosine")
_LGL2O_TAU = points(("power",), lr=(3.0,), tau=(2e3, 5e3, 1e4, 2e4, 5e4))  # LGL2O, appendix E
# Three of the rates are those of LGL2O for SGD on convolutional networks (appendices D and E). The
# other two lie between them.
_LGL2O_CONVOLUTIONAL = points(("power",), lr=(1e-4, 1e-2, 1e-1, 3e-1, 3.0), tau=(2e4, 5e4))
_CONSTANT = (3e-2, 1e-1, 3e-1, 1.0, 3.0)  # Meta Guard uses 3.0
_LGL2O_ADAM = points(("constant",), lr=(1e-4, 1e-3, 1e-2, 1e-1))
_L3RS_ADAM = points(_BOTH, lr=(1e-5, 1e-4, 1e-3))  # L3RS, section 4


def _of_paper(
    label: str, make: Callable[..., Any], grid: tuple[Point, ...], *, head_only: bool = False
) -> Baseline:
    return Baseline(label, make, grid, head_only=head_only, extends=False)


def _muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon that takes the kernels of convolutions as matrices, too."""
    return optax.contrib.muon(schedule, muon_weight_dimension_numbers=muon_axes)


_ADAMW = Baseline("AdamW", optax.adamw, points(_ALL, lr=_RATES, weight_decay=(1e-4, 1e-1)))

BASELINES: dict[str, Baseline] = {
    "sgd": Baseline("SGD", optax.sgd, points(_BOTH, lr=(0.03, 0.1, 0.3, 0.6, 1.0, 3.0))),
    "momentum": Baseline(
        "Momentum",
        lambda schedule: optax.sgd(schedule, momentum=0.9),
        points(_BOTH, lr=(0.003, 0.01, 0.03, 0.1, 0.3)),
    ),
    "adam": Baseline("Adam", optax.adam, points(_BOTH, lr=_RATES)),
    "adamw": _ADAMW,
    "adamw-groups": _ADAMW._replace(label="AdamW (groups)", draws=30),
    "nadamw": Baseline("NAdamW", optax.nadamw, _ADAMW.grid),
    "lion": Baseline(  # its authors: a rate of a tenth of AdamW's, with ten times its weight decay
        "Lion",
        optax.lion,
        points(_ALL, lr=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), weight_decay=(1e-3, 1.0)),
    ),
    "schedule-free-adamw": Baseline(
        "Schedule-free AdamW",
        optax.contrib.schedule_free_adamw,
        points(("constant", "warmup_constant"), lr=_RATES, weight_decay=(0.0, 1e-2, 1e-1)),
        eval_params=optax.contrib.schedule_free_eval_params,
    ),
    "muon": Baseline("Muon", _muon, points(_BOTH, lr=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1))),
    "prodigy": Baseline(
        "Prodigy",
        optax.contrib.prodigy,
        points(_ALL, lr=(0.3, 1.0, 3.0), weight_decay=(0.0, 1e-1)),
    ),
    "sgd-lgl2o": _of_paper("SGD (LGL2O's grid)", optax.sgd, _LGL2O_TAU),
    "sgd-lgl2o-cnn": _of_paper("SGD (LGL2O's grid, CNN)", optax.sgd, _LGL2O_CONVOLUTIONAL),
    "adam-lgl2o": _of_paper("Adam (LGL2O's grid)", optax.adam, _LGL2O_ADAM),
    "sgd-meta-guard": _of_paper("SGD (constant)", optax.sgd, points(("constant",), lr=_CONSTANT)),
    "sgd-meta-guard-3": _of_paper("SGD at 3", optax.sgd, points(("constant",), lr=(3.0,))),
    "adam-l3rs": _of_paper("Adam (L3RS's grid)", optax.adam, _L3RS_ADAM),
    "adam-l3rs-head": _of_paper("Adam (head only)", optax.adam, _L3RS_ADAM, head_only=True),
}


def chosen(baseline: Baseline, point: Point, head: str = "") -> Adjustable:
    """The baseline at one point of its grid, ``num_steps -> transformation``.

    Args:
      baseline: the baseline.
      point: the point of its grid.
      head: name of the read-out layer in the params, for a baseline that trains only this layer.
    """
    return Adjustable(
        _transformation(baseline.make, head if baseline.head_only else None),
        lambda num_steps: jax.tree.map(jnp.asarray, _arrays(point, num_steps)),
        baseline.eval_params,
    )


def groups_of(params: Params) -> Params:
    """The name of each leaf's group, as a tree of the structure of `params`.

    Groups are the keys of the outermost level of the tree that has several, if these are 2 to
    `MOST_GROUPS`, for example the layers of a network, or kernel and bias of a single layer. Else
    leaves are grouped by their role: "matrices" (two axes and more), "embeddings" (of these, those
    that the last key of their name calls so), and "vectors" (biases, scales, scalars).
    """
    leaves, structure = jax.tree.flatten_with_path(params)
    paths = [path for path, _ in leaves]
    for depth in range(1, 1 + max(map(len, paths), default=0)):
        names = [path_name(path[:depth]) for path in paths]
        if len(set(names)) > 1:
            if len(set(names)) <= MOST_GROUPS:
                return jax.tree.unflatten(structure, names)
            break
    return jax.tree.unflatten(structure, [_role(path_name(path), leaf) for path, leaf in leaves])


def _role(name: str, leaf: Any) -> str:
    if np.ndim(leaf) < 2:
        return "vectors"
    return "embeddings" if "embed" in name.rpartition("/")[2].lower() else "matrices"


def _arrays(point: Point, num_steps: int) -> dict[str, Any]:
    """The tables of rates of a point, one for each group of leaves if it has groups, and more."""
    arguments = {name: np.float32(point[name]) for name in ARGUMENTS if name in point}
    rates = point["lr"]
    if not isinstance(rates, Mapping):
        return {"rates": _rates(point, num_steps), **arguments}
    tables = {group: _rates({**point, "lr": rate}, num_steps) for group, rate in rates.items()}
    return {"rates": tables, **arguments}


def _rates(point: Point, num_steps: int) -> np.ndarray:
    """The learning rate of each step, ``[num_steps]``."""
    arguments = {k: v for k, v in point.items() if k not in ("schedule", *ARGUMENTS)}
    schedule = SCHEDULES[point["schedule"]](num_steps, **arguments)
    counts = np.arange(num_steps, dtype=np.float32)
    return np.broadcast_to(np.asarray(schedule(counts), np.float32), counts.shape)  # type: ignore


@lru_cache
def _transformation(make: Callable[..., Any], head: str | None):
    """``arrays of a point -> transformation``, one function per optimizer."""

    def from_arrays(arrays):
        arrays = dict(arrays)
        tables = arrays.pop("rates")

        def with_rates(table):
            return make(lambda count: table[jnp.minimum(count, len(table) - 1)], **arrays)

        if isinstance(tables, Mapping):
            tx = optax.partition({g: with_rates(t) for g, t in tables.items()}, groups_of)
        else:
            tx = with_rates(tables)
        if head is None:
            return tx
        return optimizers.head_only(tx, lambda name: name.startswith(f"{head}/"))

    return from_arrays
