"""Shared by all tests: one compilation cache per run, and small real problems."""

import os
import tempfile
from pathlib import Path

import jax
import pytest

import metaopt
from metaopt import config


@pytest.fixture(scope="session", autouse=True)
def compilation_cache():
    """Workers of one run share compiled programs; nothing outlives the run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"metaopt-tests-{run}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def digits() -> metaopt.Task:
    """The digits task of the main job: MLP 64-32-10, batch 64."""
    return config.TASKS["digits"]()
