"""How many inner runs go side by side, and that it changes no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt.core import cpu
from metaopt.core.cpu import CACHE, for_each
from metaopt.meta import devices
from metaopt.meta.population import evaluate, evaluate_one


def rounds(jaxpr) -> list[int]:
    """Lengths of the loops of a program, outer ones first."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found += [equation.params["length"], *rounds(equation.params["jaxpr"].jaxpr)]
    return found


@pytest.mark.parametrize(
    "cores, held, chunk, loops",
    [
        (1, CACHE, 0, [12]),  # each fills the cache
        (1, 10 * CACHE, 0, [12]),  # or more than that
        (1, CACHE // 4, 0, [3]),
        (1, CACHE // 5, 0, [3]),  # 5 would fit, and do not divide 12
        (3, CACHE // 2, 0, [2]),  # a device of three cores
        (1, 0, 0, []),
        (float("inf"), 10 * CACHE, 0, []),  # an accelerator
        (1, CACHE, 6, [2]),  # as told
        (1, CACHE, 100, []),
    ],
)
def test_so_many_go_side_by_side_as_fit_in_the_cache(monkeypatch, cores, held, chunk, loops):
    monkeypatch.setattr(cpu, "cores_each", lambda: cores)
    of_all = lambda xs: for_each(lambda x: jnp.sin(x) + 1, xs, held, chunk)
    xs = np.linspace(0.0, 3.0, 12, dtype=np.float32)
    assert rounds(jax.make_jaxpr(of_all)(xs).jaxpr) == loops
    np.testing.assert_allclose(of_all(xs), np.sin(xs) + 1, rtol=1e-6)


@pytest.mark.parametrize("held, loops", [(CACHE, []), (CACHE + 1, [1])])
def test_a_single_run_that_leaves_the_cache_has_no_axis(monkeypatch, held, loops):
    monkeypatch.setattr(cpu, "cores_each", lambda: 1)
    of_all = lambda xs: for_each(lambda x: x @ x.T, xs, held)
    xs = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert rounds(jax.make_jaxpr(of_all)(xs).jaxpr) == loops
    np.testing.assert_allclose(of_all(xs)[0], xs[0] @ xs[0].T)


@pytest.mark.parametrize(
    "cores, held, loops",
    [
        (1, 0, [3]),  # a core of its own: one task after the other
        (1, CACHE // 2, [3, 2]),  # and pairs of candidates
        (2, 0, []),  # more cores: side by side while they fit
        (2, CACHE // 2, [3]),
        (2, CACHE, [3, 2]),
    ],
)
def test_a_core_takes_one_task_after_the_other(monkeypatch, cores, held, loops):
    monkeypatch.setattr(cpu, "cores_each", lambda: cores)
    run = lambda candidate, start, shared: jnp.sin(candidate) * start + shared
    of_all = lambda p, s: evaluate(run, p, s, jnp.float32(7.0), devices.EVERYTHING_HERE, held)
    population, starts = np.arange(4, dtype=np.float32), np.arange(3, dtype=np.float32)
    assert rounds(jax.make_jaxpr(of_all)(population, starts).jaxpr) == loops
    expected = np.sin(population)[:, None] * starts + 7
    np.testing.assert_allclose(of_all(population, starts), expected, rtol=1e-6)


def test_runs_of_one_candidate_are_shared_out():
    """On a mesh of one device; `test_devices` has one of four, over which they do not divide."""
    run = lambda start, shared: start * shared
    starts = np.arange(5, dtype=np.float32)
    for mesh in (None, devices.mesh_for(2, 5, jax.devices()[:1])):
        of_all = jax.jit(lambda s, mesh=mesh: evaluate_one(run, s, jnp.float32(3.0), mesh))
        np.testing.assert_array_equal(of_all(starts), 3 * starts)
