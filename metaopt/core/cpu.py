"""Tuning of XLA for CPUs: compiler options, layouts, loops in place of batched programs, Adam.

Nothing here changes what is computed. Options, layouts and loops act on CPUs only. Each part says
what it gains and which command measures it, so that one can see whether a new version of XLA still
needs it. The records are described in docs/scaling.md.

* `fast`: vector code for narrow layers. L3RS 1.16 to 1.26 times as fast on small networks, other
  optimizers 1.0 to 1.08 (``python -m experiments.compiler_options``).
* `quick_options`: shorter compilation of evaluations. No record; compare the times of an
  evaluation with and without the option.
* `fast_convolutions`: gradients of convolutions in loops and branches, which leave XLA's fast path
  otherwise (``python -m benchmarks guards``, the rows of conv and resnet).
* `in_rows`: gradients in the layout of the params; it is part of the records of `fast`.
* `for_each`, `for_all`: one run after the other where `vmap` is slower: 0.94 to 2.5 times as fast,
  mostly 1.2 and more (``python -m experiments.population_forms`` and
  ``python -m experiments.evaluation_forms``).
* `negated_gradient` and `scale_by_adam`: forms of SGD and Adam for populations of L3RS. No record
  yet; ``python -m experiments.base_forms`` compares them with optax's.
* `metaopt.tasks.networks.Conv` has a convolution of its own
  (``python -m experiments.convolution_forms``).
"""

import math
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Literal

CACHE = 2**21  # bytes of cache close to a CPU core: the state of runs side by side should fit


def jit(fn: Callable[..., Any], *, quick: bool = False, **settings: Any) -> Callable[..., Any]:
    """`jax.jit` with compiler options for CPUs.

    The backend is asked when the function is first called, not when it is decorated. JAX refuses
    compiler options within another program: there `fn` is traced as it is.

    Args:
      fn: a pure function of pytrees of arrays.
      quick: compile sooner, for a program that runs for seconds (`quick_options`). Others are
        compiled to run fast (`fast`).
      **settings: of `jax.jit`. Static arguments must be given by keyword.
    """

    @cache
    def program() -> Callable[..., Any]:
        options = quick_options() if quick else fast()
        return jax.jit(fn, compiler_options=options, **settings)

    @wraps(fn)
    def call(*args: Any, **static: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            return fn(*args, **static)
        return program()(*args, **static)

    call.program = program  # type: ignore[attr-defined]  # for `memory_of`
    return call


def memory_of(call: Any, *args: Any, **static: Any) -> int | None:
    """Bytes that a function of `jit` needs on each device: arguments, results and temporaries.

    The program is compiled for it, and not again when the function is called with such arguments.

    Args:
      call: a function of `jit`.
      *args: its arguments.
      **static: its static arguments.

    Returns:
      The bytes, or None where XLA does not tell.
    """
    used = call.program().lower(*args, **static).compile().memory_analysis()
    if used is None:
        return None
    sizes = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    return sizes - used.alias_size_in_bytes


def quick_options() -> dict[str, Any]:
    """Compiler options for programs that run for seconds.

    XLA's fusion emitters for CPUs lengthen the compilation of an evaluation, whose programs run no
    faster for them. (VeLO's meta-training does.)
    """
    return option("xla_cpu_use_fusion_emitters", False)


def fast() -> dict[str, Any]:
    """Compiler options for programs that run for long: vector code for narrow layers.

    At its highest optimization level LLVM unrolls a loop over the 20 or 32 units of a layer
    completely, and then finds no loop to vectorise. Level 2 does not unroll it.

    Empty where JAX was told to leave optimizations out (`JAX_DISABLE_MOST_OPTIMIZATIONS`), as tests
    do: the options would bring them back.
    """
    if jax.default_backend() != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return {}
    return {
        **option("xla_backend_optimization_level", 2),
        **option("xla_cpu_prefer_vector_width", 512),
    }


@cache
def option(name: str, value: Any) -> dict[str, Any]:
    """``{name: value}`` for XLA; empty where its version or backend does not know the option."""
    options = {name: value}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def in_rows(grad: jax.Array) -> jax.Array:
    """`grad`, on CPU stored in row-major order as params are.

    XLA computes the gradient of a dense layer transposed, and would transpose it again in each
    loop over it.
    """
    if grad.ndim < 2 or jax.default_backend() != "cpu":
        return grad
    return with_layout_constraint(grad, Layout(tuple(range(grad.ndim))))


def fast_convolutions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, whose convolutions XLA for CPUs can compute fast inside of loops and branches too.

    XLA has a fast convolution for one order of axes: batch, space, channels, and for the kernel
    space, inputs, outputs. It brings convolutions into this order in the main computation of a
    program only, not in the bodies of loops and branches. Gradients of convolutions have other
    orders. Here they are brought into it before XLA sees them. The results are the same.

    Calls outside of a jitted program are left alone. So are convolutions in loops, branches and
    `jax.checkpoint` inside of `fn`.

    Args:
      fn: a function of pytrees of arrays, traced as it is called: it may close over tracers.

    Returns:
      A function of the same arguments.
    """

    @wraps(fn)
    def call(*args: Any) -> Any:
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
        if not is_traced or jax.default_backend() != "cpu":
            return fn(*args)
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        outputs = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return call


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    """Evaluates a jaxpr with its convolutions in the order of axes that XLA has fast code for."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for equation in jaxpr.eqns:
        primitive, inputs = equation.primitive, [read(v) for v in equation.invars]
        if primitive is jax.lax.conv_general_dilated_p:
            outputs = [_convolve(*inputs, **equation.params)]
        elif primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            params = primitive.get_bind_params(equation.params)
            functions, params = params if isinstance(params, tuple) else ((), params)
            outputs = primitive.bind(*functions, *inputs, **params)
            outputs = outputs if primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _convolve(lhs: jax.Array, rhs: jax.Array, *, dimension_numbers: Any, **params: Any):
    """A convolution by one of batch, space, channels with a kernel of space, inputs, outputs."""
    space = tuple(range(1, lhs.ndim - 1))
    channels = lhs.ndim - 1
    image = (0, channels, *space)  # where batch, channels and space are
    kernel = (channels, channels - 1, *(axis - 1 for axis in space))  # outputs, inputs, space

    def moved(spec: Sequence[int], to: Sequence[int]) -> list[int]:
        """The axes in an array of form `spec` that come first, second, ... in one of form `to`."""
        return [spec[to.index(axis)] for axis in range(len(to))]

    output = jax.lax.conv_general_dilated_p.bind(
        jax.lax.transpose(lhs, moved(dimension_numbers.lhs_spec, image)),
        jax.lax.transpose(rhs, moved(dimension_numbers.rhs_spec, kernel)),
        dimension_numbers=jax.lax.ConvDimensionNumbers(image, kernel, image),
        **params,
    )
    return jax.lax.transpose(output, moved(image, dimension_numbers.out_spec))


def for_all(fn: Callable[..., Any], *, long: bool) -> Callable[..., Any]:
    """``fn(shared, *own)`` for all runs at once, compiled; `own` has a leading axis of runs.

    On CPU, `long` work takes one run after the other: a `vmap` moves the axis of runs before and
    after every matrix product, and takes up to twice the time.

    Args:
      fn: a pure function of pytrees of arrays.
      long: the work is long enough that speed matters more than compilation time.
    """

    def one_by_one(shared: Any, *own: Any) -> Any:
        return jax.lax.map(lambda run: fn(shared, *run), own)

    def side_by_side(shared: Any, *own: Any) -> Any:
        return jax.vmap(partial(fn, shared))(*own)

    in_a_loop = long and jax.default_backend() == "cpu"
    return jit(one_by_one if in_a_loop else side_by_side, quick=not long)


def for_each(fn: Callable[[Any], Any], xs: Any, bytes_each: int = 0, chunk: int = 0) -> Any:
    """`fn` of each entry of ``xs [n, ...]``, side by side or one after the other.

    On CPU a `vmap` over runs on different data moves the axis of runs before and after each matrix
    product, and evicts the state of the runs from the cache. One after the other, each operation
    pays the cost of its start.

    Args:
      fn: a pure function.
      xs: pytree of arrays.
      bytes_each: size of the state of one entry. On CPU as many entries go side by side as fit in
        the `CACHE` of a device's cores; an entry that does not fit has no axis either. On other
        backends all go side by side.
      chunk: entries that go side by side in any case; 0: as `bytes_each` says.
    """
    size = jax.tree.leaves(xs)[0].shape[0]
    if not chunk:
        most = CACHE * cores_each()
        # A divisor of n, so that one program does all.
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        chunk = max((n for n in divisors if n * bytes_each <= most), default=0)
    if chunk >= size:
        return jax.vmap(fn)(xs)
    return jax.lax.map(fn, xs, batch_size=chunk if chunk > 1 else None)


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def model() -> str:
    """Name of the processor; "cpu" where the system does not tell.

    Processors of different models round differently, which 1000 steps can amplify to the size of
    the differences between seeds.
    """
    with suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or "cpu"


def cores_each() -> float:
    """CPU cores per device, over which XLA spreads large operations; infinite elsewhere."""
    return cores() / jax.local_device_count() if jax.default_backend() == "cpu" else math.inf


def negated_gradient() -> optax.GradientTransformation:
    """``optax.sgd(1.0)`` as a negation.

    optax multiplies by -1. Of a negation XLA sees that its norm, which L3RS needs, is that of the
    gradient, and computes it once.
    """
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.negative, updates))


# A constant under Adam's root. sqrt has no derivative at 0, where the second moment of a
# coordinate is whose gradient was always 0 (a dead pixel): back-propagation to b2 would be NaN. The
# constant is far below eps^2 and changes no step.
ADAM_EPS_ROOT = 1e-30


def scale_by_adam(
    b1: jax.Array, b2: jax.Array, eps: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` that skips steps itself and divides once per coordinate.

    It differs in three ways, which save time in populations on CPU:

    - It skips a step whose loss or gradient is not finite (see `metaopt.optimizers.Base`), so that
      the moments are written once instead of held twice.
    - It divides once per coordinate. XLA makes one division of optax's three too, but not in
      programs of several devices.
    - It squares by ``g * g``. Of ``g**2``, which L3RS computes for the norm of the gradient too,
      XLA would keep one copy in memory for both.
    """

    def init_fn(params):
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=optax.tree.zeros_like(params),
        )

    def update_fn(updates, state, params=None, *, finite=True, **extra_args):
        del params, extra_args
        count = optax.safe_increment(state.count)
        power = jnp.asarray(count, b1.dtype)
        correction1, correction2 = 1 / (1 - b1**power), 1 / (1 - b2**power)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = jax.tree.map(lambda g, v: (1 - b2) * g * g + b2 * v, updates, state.nu)
        state = optax.tree.where(finite, optax.ScaleByAdamState(count, mu, nu), state)

        def direction(m, v):
            return m * correction1 / (jnp.sqrt(v * correction2 + ADAM_EPS_ROOT) + eps)

        return jax.tree.map(direction, state.mu, state.nu), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
