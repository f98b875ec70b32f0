"""The driver: an interrupted run ends as an uninterrupted one, and refuses what does not fit."""

import gc
import itertools
import json
import re
import subprocess
import sys
import types

import children
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaopt import meta, optimizers, tasks
from metaopt.core.types import single
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta import NESConfig, PESConfig, TBPTTConfig
from metaopt.meta.loop import METRICS, STATES, driver, read_metrics, train
from metaopt.zoo.exports import load

SMALL = {
    "task": "quadratic",
    "learned": optimizers.L3RS(base=("sgd",)),
    "method": NESConfig(population=4, tasks=1, min_steps=3, max_steps=5),
    "steps": 12,
}


def small_trainer(method="nes"):
    lopt, family = children.step_sizes(), single(tasks.quadratic(children.DIM))
    theta = lopt.init(jax.random.key(0), jnp.zeros(children.DIM))
    windows = {"rollout": 4, "truncation": 2}
    trainer = {
        "nes": lambda: meta.nes(
            lopt, family, NESConfig(population=4, tasks=1, min_steps=2, max_steps=2)
        ),
        "pes": lambda: meta.pes(lopt, family, PESConfig(population=4, **windows)),
        "tbptt": lambda: meta.tbptt(lopt, family, TBPTTConfig(tasks=2, **windows)),
    }[method]()
    return trainer, theta


def run(out, steps, *, method="nes", **kwargs):
    trainer, theta = small_trainer(method)
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


@pytest.mark.parametrize("method", ["nes", "pes", "tbptt"])
def test_a_run_compiles_each_program_once_and_so_does_its_resumption(tmp_path, caplog, method):
    """Whether the state is the first one, that of a step or validation, or one that was saved."""
    for steps, expected in ((4, ["first", "keep_best", "step"]), (8, ["keep_best", "step"])):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            run(tmp_path, steps, method=method)
        compiled = re.findall(r"Compiling jit\((first|step|keep_best)\)", caplog.text)
        assert sorted(compiled) == expected


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
    with pytest.raises(ValueError, match="another process is writing"):
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


def test_a_changed_configuration_is_taken_when_asked_for(tmp_path):
    old = {"task": "a", "method": {"name": "nes", "sigma": 0.1}}
    new = {"task": "a", "method": {"name": "nes", "sigma": 0.2}, "seed": 3}
    run(tmp_path, 2, config=old)
    with pytest.raises(ValueError, match=r"\(method.sigma: 0.1 -> 0.2, seed: None -> 3\)"):
        run(tmp_path, 4, config=new)
    with pytest.warns(UserWarning, match=r"changed configuration \(method.sigma: 0.1 -> 0.2, seed"):
        run(tmp_path, 4, config=new, resume_changed=True)
    np.testing.assert_array_equal(read_metrics(tmp_path)["step"], np.arange(4))
    run(tmp_path, 4, config=new)  # from now on this is the run's configuration


def test_minutes_end_a_run_and_count_its_earlier_parts(tmp_path, monkeypatch):
    """On a clock that advances one second per look: two looks per step."""
    clock = types.SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)
    monkeypatch.setattr(driver, "time", clock)

    def steps_after(seconds, steps=1000):
        settings = {"minutes": seconds / 60, "validate_every": 1000, "checkpoint_every": 1000}
        run(tmp_path, steps, **settings)
        metrics = read_metrics(tmp_path)
        assert not np.isnan(metrics["validation_loss"][-1])  # the last theta of a part competes
        return len(metrics["step"])

    assert steps_after(20) == 10
    assert steps_after(20) == 10  # its time is used up
    assert steps_after(31) == 16  # 11 seconds more
    assert steps_after(1000, steps=20) == 20  # the number of steps is a bound too


def test_negative_minutes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"minutes must not be negative, got -1"):
        run(tmp_path, 2, minutes=-1.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path):
    whole, _ = run(tmp_path / "whole", 6, checkpoint_every=2)
    run(tmp_path / "damaged", 4, checkpoint_every=2)
    for path in (tmp_path / "damaged" / STATES / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(UserWarning, match=r"step 4 is damaged .* from step 2"):
        parts, _ = run(tmp_path / "damaged", 6, checkpoint_every=2)
    gc.collect()  # what orbax leaves behind after a failed read complains when it is collected
    leaves_equal(whole, parts)
    np.testing.assert_array_equal(read_metrics(tmp_path / "damaged")["step"], np.arange(6))


def test_a_warm_start_must_fit(tmp_path):
    meta_train(TrainJob(**SMALL, out=tmp_path / "first"))
    again = TrainJob(**SMALL, warm_start=str(tmp_path / "first"), out=tmp_path / "second")
    assert load(meta_train(again)).trained["warm_start"] == str(tmp_path / "first")
    other = {**SMALL, "learned": optimizers.L3RS(base=("adam",))}
    with pytest.raises(ValueError, match="warm_start"):
        meta_train(TrainJob(**other, warm_start=str(tmp_path / "first"), out=tmp_path / "x"))
