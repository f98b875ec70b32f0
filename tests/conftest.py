"""Shared by all tests: one compilation cache per run, and small real problems."""

import os

# Most of the suite's time is compilation: leave out what only makes programs faster. Tests marked
# `optimized` compile as users do. Set before JAX is imported, and inherited by child processes.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # see metaopt/core/cpu.py

import functools
import gc
from pathlib import Path

import jax
import jaxtyping
import pytest

# Check the dtypes and shapes of arrays in metaopt. The option `--jaxtyping-packages` would do the
# same, but before jaxtyping 0.3.7 only for packages that no conftest.py imports.
jaxtyping.install_import_hook("metaopt", "typechecking.check_arrays")

import metaopt
from metaopt import datasets
from metaopt.tasks import catalog

# What `devices.initialise` finds must not depend on which test used JAX first.
jax.config.update("jax_num_cpu_devices", 1)

MOST_MAPS = 20_000  # of memory, after a module

# A collection walks through all that JAX has traced so far: a tenth of the suite's time.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Workers of one run share compiled programs, tuned baselines and pretrained networks.

    The user's own stay apart, and pytest removes the folders some runs later.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    os.environ["METAOPT_CACHE_DIR"] = str(shared / "cache")
    programs = str(shared / "programs")
    jax.config.update("jax_compilation_cache_dir", programs)
    # Small programs too: to read one takes a quarter of the time that its compilation takes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs  # for child processes
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="module", autouse=True)
def programs_fit():
    """Frees the compiled programs after a module, if they are many.

    Each holds memory maps, of which Linux gives a process 65530 by default. Beyond that XLA ends
    the process. Programs that are needed again are read from the cache on disk.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def optimized(request):
    """Honours ``@pytest.mark.optimized``: full compiler optimizations for this test."""
    if request.node.get_closest_marker("optimized"):
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
    else:
        yield


@pytest.fixture(scope="session")
def digits() -> metaopt.Task:
    """The digits task of the main job: MLP 64-32-10, batch 64."""
    return catalog.build("digits")


@pytest.fixture(scope="session")
def real_data():
    """``real_data("mnist")``: a prepared set; where it is not prepared, the test is skipped."""

    @functools.cache
    def load(name: str) -> datasets.Dataset:
        if datasets.state(name) == "not prepared":
            command = datasets.specs()[name].command
            pytest.skip(f"{name} is not prepared in {datasets.data_root()}: give `{command}`")
        return datasets.load(name)

    return load
