"""Calls side by side: each once, in processes that divide the cores among themselves."""

import json
import os

import pytest
from process_calls import fail, report

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
