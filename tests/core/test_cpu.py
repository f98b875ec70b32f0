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
    assert option.items() <= cpu.fast().items()  # tests run on CPU


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
