"""A run that is killed again and again ends, bit for bit, as one that is left alone."""

import os
import shutil
import signal
import subprocess
import sys
import time

import children
import numpy as np
import pytest

from metaopt.meta.loop import METRICS, STATES, read_metrics

KILLS = int(os.environ.get("METAOPT_KILLS", "10"))  # `make soak` takes 100
STEPS = 40 * KILLS


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run; beside it the programs it compiled."""
    folder = tmp_path_factory.mktemp("whole")
    run = children.start(
        children.run_small, folder / "run", STEPS, folder / "cache", checkpoint_every=50
    )
    assert children.finish(run, timeout=1800) == [0]
    return folder / "run"


def lines(out) -> int:
    path = out / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(child, out, random) -> bool:
    """SIGKILLs a run: one in four before its first step, the others some steps later."""
    if random.random() < 0.25:
        child.join(random.uniform(0.0, 2.0))
    else:
        steps, before, pause = random.integers(1, 20), lines(out), random.uniform(0.0, 0.02)
        # A resumed run drops the lines that it takes again: count from the fewest seen.
        while child.is_alive() and lines(out) < before + steps:
            before = min(before, lines(out))
            time.sleep(0.005)
        time.sleep(pause)
    if not child.is_alive():
        return False
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def test_killed_at_random_times_it_ends_with_the_same_bits(whole, tmp_path):
    out, killed = tmp_path / "run", 0
    random = np.random.default_rng()
    for _ in range(KILLS):
        child = children.start(
            children.run_small, out, STEPS, whole.parent / "cache", checkpoint_every=3
        )
        killed += kill_at_random(child, out, random)
    assert killed == KILLS
    assert not (out / STATES / str(STEPS)).exists()
    last = children.start(
        children.run_small, out, STEPS, whole.parent / "cache", checkpoint_every=3
    )
    assert children.finish(last, timeout=1800) == [0]
    assert children.final_checksum(out) == children.final_checksum(whole)
    np.testing.assert_array_equal(np.load(out / "best.npy"), np.load(whole / "best.npy"))
    one, other = read_metrics(whole), read_metrics(out)
    for name in ("step", "meta_loss", "grad_norm", "validation_loss"):
        np.testing.assert_array_equal(other[name], one[name])


def test_sigterm_lets_the_step_finish_and_saves_it(whole, tmp_path):
    out, cache = tmp_path / "run", whole.parent / "cache"
    slow = {"checkpoint_every": 1_000_000, "validate_every": 1_000_000}
    child = children.start(children.run_small, out, 1_000_000, cache, **slow)
    while child.is_alive() and lines(out) < 5:
        time.sleep(0.01)
    child.terminate()
    assert children.finish(child) == [128 + signal.SIGTERM]
    step, _ = children.final_checksum(out)
    assert step == lines(out) >= 5


def test_the_command_ends_with_143_on_sigterm_and_goes_on_when_given_again(tmp_path):
    command = [sys.executable, "-m", "metaopt", "train", "--task", "quadratic"]
    command += ["--learned.base", "sgd", "--method.population", "4", "--method.tasks", "1"]
    command += ["--method.min-steps", "3", "--method.max-steps", "5"]
    command += ["--out", str(tmp_path / "run"), "--steps", "1000000"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    seen = 0
    for _ in range(2):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and lines(tmp_path / "run") < seen + 3:
            time.sleep(0.01)
        process.terminate()
        _, told = process.communicate()
        assert process.returncode == 143
        step, _ = children.final_checksum(tmp_path / "run")
        assert step == lines(tmp_path / "run") >= seen + 3
        assert f"saved after step {step}" in told
        seen = step


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_full_disk_is_named_and_the_last_good_checkpoint_is_kept(whole, tmp_path):
    disk, cache = tmp_path / "disk", whole.parent / "cache"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        first = children.start(children.run_small, disk / "run", 3, cache)
        assert children.finish(first) == [0]
        before = children.final_checksum(disk / "run")
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(free - 20_000, 0)))
        child = children.start(
            children.quietly, children.run_small, tmp_path / "told", disk / "run", 600, cache
        )
        assert children.finish(child) == [1]
        told = (tmp_path / "told").read_text()
        assert "OSError" in told and "The disk is full" in told and "make room" in told
        kept = children.final_checksum(disk / "run")
        assert kept[0] >= before[0]
        (disk / "filler").unlink()
        again = children.start(children.run_small, disk / "run", kept[0] + 3, cache)
        assert children.finish(again) == [0]
        assert children.final_checksum(disk / "run")[0] == kept[0] + 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)
