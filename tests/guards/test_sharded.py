"""A guard on eight devices, with split params, donated buffers, and a process that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("sharded_training.py")
STEPS = 22


def start(folder, devices: int):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Without optimizations, two collectives of a program can wait for each other for ever on
        # CPU (jaxlib 0.10.2).
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, SCRIPT, folder, str(STEPS)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process) -> list[str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out.splitlines()


def result(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith(("saved", "resumed"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run on eight devices, and what it printed."""
    folder = tmp_path_factory.mktemp("sharded") / "whole"
    return folder, finish(start(folder, 8))


def test_state_is_split_as_the_params_are_and_decisions_are_those_of_one_device(whole, tmp_path):
    """Moments, features and both runners; the step compiles once."""
    folder, lines = whole
    split, decisions, _ = result(lines)
    assert int(split.split()[1]) >= 6  # params, both runners, two moments of each
    (tmp_path / "one").mkdir()
    _, of_one, _ = result(finish(start(tmp_path / "one", 1)))
    assert of_one == decisions
    with np.load(folder / "params.npz") as found, np.load(tmp_path / "one/params.npz") as expected:
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_killed_inside_a_window_it_goes_on_with_the_same_bits(whole):
    folder, lines = whole
    resumed = []
    for saved in ("saved 6", "saved 15"):  # with windows of four steps
        line = ""
        with start(folder.parent / "killed", 8) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                resumed += [line] if line.startswith("resumed") else []
                if line.strip() == saved:
                    process.kill()
                    break
            errors = process.stderr.read()
        # A process that ended by itself says why here.
        assert process.returncode == -signal.SIGKILL and line.strip() == saved, errors[-3000:]
    last = finish(start(folder.parent / "killed", 8))
    resumed += [line for line in last if line.startswith("resumed")]
    assert len(resumed) == 2
    assert result(last) == result(lines)
