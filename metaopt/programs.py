"""Compiled programs that do not hold the data sets they work on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` for functions that close over arrays: these become arguments of the program.

    `jax.jit` writes them into each program as constants. XLA then carries a data set of 100 MB
    through all of its passes (seconds per program), and every program keeps a copy.

    Args:
      fn: a pure function of pytrees of arrays. It is traced once per structure, shapes and dtypes
        of its arguments; what it closes over must not change.
    """
    programs: dict[Any, Callable[..., Any]] = {}

    def call(*args):
        leaves, structure = jax.tree.flatten(args)
        kind = (structure, *map(jax.typeof, leaves))
        if kind not in programs:
            programs[kind] = _program(fn, args)
        return programs[kind](leaves)

    return call


def _program(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
    """`fn` for leaves of the kind of those in `args`."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)

    def run(constants, leaves):
        return jax.core.eval_jaxpr(closed.jaxpr, constants, *leaves)

    run.__name__ = getattr(fn, "__name__", "run")  # what profiles and logs call the program
    program = jax.jit(run)
    return lambda leaves: jax.tree.unflatten(structure, program(closed.consts, leaves))
