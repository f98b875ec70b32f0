"""The driver: an interrupted run ends as an uninterrupted one, and refuses what does not fit."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import config, jobs, meta
from metaopt.checkpoints import load
from metaopt.config import TrainJob
from metaopt.meta import NESConfig
from metaopt.training import METRICS, read_metrics, train

SMALL = {
    "task": "quadratic",
    "learned": "l3rs",
    "base": "sgd",
    "steps": 12,
    "nes": NESConfig(population=4, tasks=1, min_steps=3, max_steps=5),
}


def small_trainer():
    lopt = config.optimizers.lstm(hidden=2)
    family = config.task_family("quadratic")
    theta = lopt.init(jax.random.key(0), jnp.zeros(32))
    settings = NESConfig(population=4, tasks=1, min_steps=2, max_steps=2)
    return meta.nes(lopt, family, theta, settings), theta


def run(out, steps, **kwargs):
    trainer, theta = small_trainer()
    validate = lambda theta, key: sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(theta))
    settings = {"config": {"a": 1}, "validate": validate, "validate_every": 2, **kwargs}
    return train(trainer, theta, steps=steps, seed=0, out=out, **settings)


def leaves_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path):
    whole, loss = run(tmp_path / "whole", 8, checkpoint_every=3)
    run(tmp_path / "parts", 5, checkpoint_every=2)
    parts, parts_loss = run(tmp_path / "parts", 8, checkpoint_every=2)
    leaves_equal(whole, parts)
    assert loss == parts_loss
    one, two = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    np.testing.assert_array_equal(one["step"], np.arange(8))
    np.testing.assert_array_equal(one["meta_loss"], two["meta_loss"])


def test_a_finished_run_is_not_run_again(tmp_path):
    run(tmp_path, 4)
    lines = (tmp_path / METRICS).read_text()
    run(tmp_path, 4)
    assert (tmp_path / METRICS).read_text() == lines


def test_the_best_theta_is_never_worse_than_the_first(tmp_path):
    _, theta = small_trainer()
    start = sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(theta))
    best, loss = run(tmp_path, 6)
    assert loss <= start * (1 + 1e-6)
    size = sum(float(jnp.sum(jnp.abs(x))) for x in jax.tree.leaves(best))
    np.testing.assert_allclose(size, loss, rtol=1e-5)


def test_a_changed_configuration_is_named_and_refused(tmp_path):
    run(tmp_path, 2)
    with pytest.raises(ValueError, match="a: 1 -> 2"):
        run(tmp_path, 2, config={"a": 2})
    run(tmp_path, 2, config={"a": 2}, overwrite=True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2}


def test_two_processes_do_not_write_one_run(tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1)"
    hold += "; sys.stdout.flush(); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline()
    with pytest.raises(ValueError, match="another process is training"):
        run(tmp_path, 2)
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    run(tmp_path, 2)


def test_zero_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        run(tmp_path, 0)


def test_a_half_written_last_line_of_metrics_is_dropped(tmp_path):
    run(tmp_path, 3, checkpoint_every=1)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 3, "meta_lo')
    run(tmp_path, 5, checkpoint_every=1)
    np.testing.assert_array_equal(read_metrics(tmp_path)["step"], np.arange(5))


def test_killed_at_any_time_it_goes_on_to_the_same_theta(tmp_path):
    """Kills the real command with SIGKILL, twice, then lets it finish."""
    command = [sys.executable, "-m", "metaopt.cli", "train", "--task", "quadratic"]
    command += ["--learned", "l3rs", "--base", "sgd", "--steps", "40", "--nes.population", "4"]
    command += ["--nes.tasks", "1", "--nes.min-steps", "3", "--nes.max-steps", "5"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(out):
        return subprocess.Popen(
            [*command, "--out", str(out)], env=environment, stdout=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait() == 0
    killed = 0
    for lines in (5, 28):
        process = start(tmp_path / "killed")
        metrics = tmp_path / "killed" / METRICS
        while process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= lines:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.01)
        process.wait()
    assert killed == 2
    assert start(tmp_path / "killed").wait() == 0
    leaves_equal(load(tmp_path / "killed").theta, load(tmp_path / "whole").theta)


def test_a_warm_start_must_fit(tmp_path):
    jobs.meta_train(TrainJob(**SMALL, out=tmp_path / "first"))
    again = TrainJob(**SMALL, warm_start=str(tmp_path / "first"), out=tmp_path / "second")
    assert load(jobs.meta_train(again)).trained["warm_start"] == str(tmp_path / "first")
    other = {**SMALL, "base": "adam"}
    with pytest.raises(ValueError, match="warm_start"):
        jobs.meta_train(TrainJob(**other, warm_start=str(tmp_path / "first"), out=tmp_path / "x"))
