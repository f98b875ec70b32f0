"""Calls side by side: each once, in processes that divide the cores among themselves."""

import json
import os
import signal
import subprocess
import sys
import time

import process_calls
import pytest
from process_calls import end_abruptly, fail, leave, report

from metaopt.core.processes import in_processes


def test_one_worker_is_this_process(tmp_path):
    in_processes(report, [(tmp_path, "a"), (tmp_path, "b")], workers=1)
    for name in "ab":
        assert json.loads((tmp_path / name).read_text())["process"] == os.getpid()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux divides the cores")
def test_workers_divide_the_cores_and_make_each_call(tmp_path):
    in_processes(report, [(tmp_path, name) for name in "abcd"], workers=2)
    facts = [json.loads((tmp_path / name).read_text()) for name in "abcd"]
    assert os.getpid() not in {fact["process"] for fact in facts}
    own = sorted(os.sched_getaffinity(0))
    shares = [own[worker::2] or own for worker in range(2)]
    assert all(fact["cores"] in shares for fact in facts)


def test_the_error_of_a_call_comes_out():
    with pytest.raises(ValueError, match="the call's own error"):
        in_processes(fail, [(1,), (2,)], workers=2)


def test_a_call_that_exits_is_told(tmp_path):
    with pytest.raises(SystemExit):
        in_processes(leave, [(0,), (0,)], workers=2)


def test_a_process_that_ends_before_its_call_is_told():
    with pytest.raises(OSError, match="a worker process ended before its task"):
        in_processes(end_abruptly, [(1,), (2,)], workers=2)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(tmp_path, number):
    parent = subprocess.Popen([sys.executable, process_calls.__file__, str(tmp_path)])
    files = [tmp_path / name for name in "ab"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.send_signal(number)
    assert parent.wait() == -number
    while time.time() - max(file.stat().st_mtime for file in files) < 0.2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
