"""Compiled programs: once per kind of arguments, and within each other; runs in a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import datasets, tasks
from metaopt.core import cpu
from metaopt.core.types import Task, single
from metaopt.tasks.networks import MLP

DATA = jnp.arange(5.0)


@pytest.mark.parametrize("quick", [False, True])
def test_a_program_may_be_a_part_of_another(quick):
    """JAX refuses compiler options anywhere but in the outermost `jax.jit`."""
    inner = cpu.jit(lambda x: x * DATA.sum(), quick=quick)
    outer = cpu.jit(lambda x: inner(x) + 1, quick=quick)
    np.testing.assert_allclose(outer(2.0), 21)
    np.testing.assert_allclose(jax.vmap(inner)(DATA), 10 * np.arange(5))
    np.testing.assert_allclose(jax.grad(inner)(3.0), 10)
    assert jax.eval_shape(inner, 1.0).dtype == jnp.float32


def test_a_program_is_traced_once_per_kind_of_arguments():
    traced = []
    double = cpu.jit(lambda x: traced.append(x) or 2 * x)
    assert [float(double(x)) for x in (1.0, 2.0, 3.0)] == [2, 4, 6]
    np.testing.assert_allclose(double(np.ones(3)), 2)
    assert len(traced) == 2


def test_a_program_of_a_task_is_traced_once_for_all_data_of_one_shape():
    traced = []

    def mean_loss(task: Task) -> jax.Array:
        traced.append(task)
        return jnp.mean(task.whole("test"))

    def make(data):
        return Task(None, None, None, whole_of, data=data)  # type: ignore

    def whole_of(data, split):
        return data

    program = cpu.jit(mean_loss)
    assert [float(program(make(jnp.full(3, x)))) for x in (1.0, 2.0)] == [1, 2]
    assert len(traced) == 1


def test_data_sets_are_not_compiled_into_programs():
    """The data are arguments of the program, not constants in its text."""
    task = tasks.classification(MLP((4, 2)), datasets.moons(), batch_size=8)
    family = single(task)

    def first_loss(family, key):
        task = family.task(family.sample(key))
        return task.loss(task.init(key), task.sample(key, ()))

    text = jax.jit(first_loss).lower(family, jax.random.key(0)).as_text()
    n = len(datasets.moons().splits["train"]["y"])
    assert f"tensor<{n}x2xf32>" in text.partition("{")[2]
    assert f"dense<{n}x2" not in text and len(text) < 200_000
    assert len(jax.tree.leaves(family)) == 6  # x and y of three splits


def test_options_that_xla_does_not_know_are_left_out():
    assert cpu.option("xla_no_such_option", 1) == {}
    option = cpu.option("xla_backend_optimization_level", 2)
    assert option == {"xla_backend_optimization_level": 2}
    assert cpu.fast() == {}  # most tests run without optimizations


@pytest.mark.optimized
def test_programs_that_run_for_long_are_compiled_to_run_fast():
    assert cpu.fast()["xla_backend_optimization_level"] == 2  # tests run on CPU
    np.testing.assert_array_equal(cpu.jit(lambda x: x + DATA)(1.0), DATA + 1)


@pytest.mark.parametrize("chunk, bytes_each", [(0, 0), (0, 2**40), (2, 0), (3, 0)])
def test_all_forms_of_a_loop_over_runs_compute_the_same(chunk, bytes_each):
    xs = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(
        cpu.for_each(lambda x: x[0] * x[1], xs, bytes_each, chunk), xs[:, 0] * xs[:, 1]
    )


@pytest.mark.parametrize("long", [False, True])
def test_runs_share_their_first_argument(long):
    program = cpu.for_all(lambda shared, x, y: shared * x + y, long=long)
    np.testing.assert_array_equal(program(2.0, DATA, DATA), 3 * DATA)


# (shape of the inputs, shape of the kernel, settings of `conv_general_dilated`)
CONVOLUTIONS = {
    "nhwc": ((2, 7, 6, 3), (3, 2, 3, 4), dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))),
    "nchw": ((2, 3, 7, 6), (4, 3, 3, 2), dict(dimension_numbers=("NCHW", "OIHW", "NCHW"))),
    "odd": ((7, 3, 2, 6), (2, 4, 3, 3), dict(dimension_numbers=("HCNW", "WOHI", "CWNH"))),
    "strides": (
        (2, 9, 8, 3),
        (3, 3, 3, 4),
        dict(
            dimension_numbers=("NHWC", "HWIO", "NCHW"),
            window_strides=(2, 3),
            padding=((1, 2), (0, 1)),
        ),
    ),
    "groups": (
        (2, 6, 6, 4),
        (3, 3, 2, 6),
        dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2, padding="SAME"),
    ),
    "batch_groups": (
        (4, 6, 6, 3),
        (3, 3, 3, 6),
        dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), batch_group_count=2),
    ),
    "dilations": (
        (2, 3, 8, 7),
        (4, 3, 3, 2),
        dict(
            dimension_numbers=("NCHW", "OIHW", "NHWC"),
            lhs_dilation=(2, 1),
            rhs_dilation=(1, 2),
            padding=((1, 2), (0, 1)),
        ),
    ),
    "one_axis": ((2, 3, 9), (3, 3, 4), dict(dimension_numbers=("NCW", "WIO", "NWC"))),
    "three_axes": (
        (2, 4, 5, 4, 3),
        (4, 3, 2, 3, 2),
        dict(dimension_numbers=("NDHWC", "OIDHW", "NCDHW")),
    ),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_in_another_order_of_axes_are_the_same(case):
    """Value and gradient, in a program of its own, in loops, in branches and under `vmap`."""
    x_shape, kernel_shape, settings = CONVOLUTIONS[case]
    settings = {"window_strides": (1,) * (len(x_shape) - 2), "padding": "VALID", **settings}
    x, kernel = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate((x_shape, kernel_shape))
    )

    def loss(kernel, x):
        out = jnp.tanh(jax.lax.conv_general_dilated(x, kernel, **settings))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))

    plain = jax.value_and_grad(loss, (0, 1))
    moved = cpu.fast_convolutions(plain)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    same = lambda a, b: jax.tree.map(close, a, b)
    expected = plain(kernel, x)
    same(moved(kernel, x), expected)  # outside of a program it is left alone
    same(jax.jit(moved)(kernel, x), expected)

    kernels = jnp.stack([kernel, 0.5 * kernel])
    loop = lambda fn: jax.lax.scan(lambda carry, k: (carry, fn(k, carry)), x, kernels)[1]
    same(jax.jit(lambda: loop(moved))(), loop(plain))
    branch = lambda flag: jax.lax.cond(
        flag, moved, lambda kernel, x: jax.tree.map(jnp.zeros_like, expected), kernel, x
    )
    same(jax.jit(branch)(True), expected)
    over = lambda fn: jax.vmap(fn, (0, None))(kernels, x)
    same(jax.jit(lambda: over(moved))(), over(plain))


def test_functions_around_convolutions_keep_their_structure_and_meaning():
    """Nested programs, custom derivatives, several outputs, integers, closures over tracers."""

    @jax.custom_jvp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0]))  # straight through
    inner = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
    )
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    kernels = {"a": jax.random.normal(jax.random.key(1), (3, 3, 3)), "n": jnp.array(2)}

    def run(scale):
        def loss(a, n):
            h = clipped(inner(scale * x, a))
            _, h = jax.lax.scan(lambda c, _: (c, inner(c, a)), h, None, length=2)
            return jnp.mean(jnp.square(jax.nn.relu(h))), {"n": n + 1, "h": h}

        return jax.value_and_grad(loss, has_aux=True), kernels

    def plain(scale):
        fn, k = run(scale)
        return fn(k["a"], k["n"])

    def moved(scale):
        fn, k = run(scale)
        return cpu.fast_convolutions(fn)(k["a"] * scale, k["n"])

    expected = jax.jit(plain)(1.0)
    found = jax.jit(moved)(1.0)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert found[0][1]["n"] == 3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )
