"""Compiled programs: once per kind of arguments, and within each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.core import compilation

DATA = jnp.arange(5.0)


@pytest.mark.parametrize("quick", [False, True])
def test_a_program_may_be_a_part_of_another(quick):
    """Options of the compiler are refused anywhere but in the outermost `jax.jit`."""
    inner = compilation.compiled(lambda x: x * DATA.sum(), quick=quick)
    outer = compilation.compiled(lambda x: inner(x) + 1, quick=quick)
    np.testing.assert_allclose(outer(2.0), 21)
    np.testing.assert_allclose(jax.vmap(inner)(DATA), 10 * np.arange(5))
    np.testing.assert_allclose(jax.grad(inner)(3.0), 10)
    assert jax.eval_shape(inner, 1.0).dtype == jnp.float32


def test_a_program_is_traced_once_per_kind_of_arguments():
    traced = []
    double = compilation.compiled(lambda x: traced.append(x) or 2 * x)
    assert [float(double(x)) for x in (1.0, 2.0, 3.0)] == [2, 4, 6]
    np.testing.assert_allclose(double(np.ones(3)), 2)
    assert len(traced) == 2


def test_options_that_xla_does_not_know_are_left_out():
    assert compilation.option("xla_no_such_option", 1) == {}
    known = compilation.option("xla_backend_optimization_level", 2)
    assert known == {"xla_backend_optimization_level": 2}
    assert known.items() <= compilation.fast().items()  # tests run on CPU
