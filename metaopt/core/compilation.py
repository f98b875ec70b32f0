"""Compiled programs that do not hold the data sets they work on."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.core


def compiled(
    fn: Callable[..., Any],
    *,
    quick: bool = False,
    place: Callable[[Any], Any] = lambda arrays: arrays,
    out_shardings: Any = None,
) -> Callable[..., Any]:
    """`jax.jit` for functions that close over arrays: these become arguments of the program.

    `jax.jit` writes them into each program as constants. XLA then carries a data set of 100 MB
    through all of its passes (seconds per program), and every program keeps a copy.

    Args:
      fn: a pure function of pytrees of arrays. It is traced once per structure, shapes and dtypes
        of its arguments; what it closes over must not change.
      quick: compile sooner, for programs that run for seconds; see `_quick`. Others: `fast`.
      place: is given the arrays that `fn` closes over, once, and puts them where they are used.
      out_shardings: as in `jax.jit`.
    """
    programs: dict[Any, Callable[..., Any]] = {}

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return fn(*args)  # a part of another program, which has options of its own
        kind = (structure, *map(jax.typeof, leaves))
        if kind not in programs:
            options = _quick() if quick else fast()
            programs[kind] = _program(fn, args, options, place, out_shardings)
        return programs[kind](leaves)

    return call


def for_all(fn: Callable[..., Any], *, long: bool) -> Callable[..., Any]:
    """``fn(shared, *own)`` for all runs at once, `own` with an axis of runs in front; compiled.

    On CPU `long` work goes one run after the other: a `vmap` moves the axis of runs before and
    after every product of matrices, and takes up to twice the time (docs/scaling.md).

    Args:
      fn: see `compiled`.
      long: rather run fast than compile soon.
    """

    def one_by_one(shared, *own):
        return jax.lax.map(lambda run: fn(shared, *run), own)

    def side_by_side(shared, *own):
        return jax.vmap(partial(fn, shared))(*own)

    loop = long and jax.default_backend() == "cpu"
    return compiled(one_by_one if loop else side_by_side, quick=not long)


def _quick() -> dict[str, Any]:
    """XLA's emitters of fusions on CPU take half of the compilation of an evaluation, and its
    programs run no faster for them; those of VeLO's meta-training do.
    """
    return option("xla_cpu_use_fusion_emitters", False)


def fast() -> dict[str, Any]:
    """Options of XLA for programs that run for long: on CPU vectors for narrow layers.

    At its highest level the compiler unrolls a loop over a layer's 20 or 32 units wholly, and then
    finds nothing to vectorise (docs/scaling.md).
    """
    if jax.default_backend() != "cpu":
        return {}
    return {
        **option("xla_backend_optimization_level", 2),
        **option("xla_cpu_prefer_vector_width", 512),
    }


@lru_cache
def option(name: str, value: Any) -> dict[str, Any]:
    """``{name: value}`` for XLA; empty where its version or backend does not take the option."""
    options = {name: value}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def _program(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, bool],
    place: Callable[[Any], Any],
    out_shardings: Any,
) -> Callable[..., Any]:
    """`fn` for leaves of the kind of those in `args`."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)

    def run(constants, leaves):
        return jax.core.eval_jaxpr(closed.jaxpr, constants, *leaves)

    run.__name__ = getattr(fn, "__name__", "run")  # what profiles and logs call the program
    if out_shardings is not None:  # of the leaves
        out_shardings = jax.tree.leaves(jax.tree.broadcast(out_shardings, shapes))
    program = jax.jit(run, compiler_options=options, out_shardings=out_shardings)
    constants = place(closed.consts)
    return lambda leaves: jax.tree.unflatten(structure, program(constants, leaves))
