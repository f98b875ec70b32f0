"""Commands that cannot work: one line on stderr that says why, exit code 2, nothing written."""

import contextlib
import os
import re
import sys
from pathlib import Path

import pytest
from refusals import bad_inputs, fingerprint, within

from metaopt.cli import main

TASKS = '''
"""Functions that a user might name as --task."""

import jax.numpy as jnp

from metaopt.tasks import quadratic

GOOD = quadratic(3)
NOT_A_FUNCTION = 3


def raises():
    raise RuntimeError("the user's own error")


def raises_key_error():
    return {}["x"]


def leaves():
    raise SystemExit(0)


def wants_an_argument(x):
    return GOOD


def nothing():
    return None


def changed(**fields):
    return GOOD.replace(**fields)


def vector_loss():
    return changed(loss=lambda params, batch: params)


def integer_loss():
    return changed(loss=lambda params, batch: jnp.int32(1))


def nan_loss():
    return changed(loss=lambda params, batch: jnp.sum(params) * jnp.nan)


def raising_loss():
    return changed(loss=lambda params, batch: batch["x"])


def no_loss():
    return changed(loss=lambda params, batch: None)


def loss_of_one_argument():
    return changed(loss=lambda params: 0.0)


def integer_params():
    return changed(init=lambda key: jnp.arange(3))


def raising_init():
    def init(key):
        raise ValueError("the user's own error")

    return changed(init=init)


def no_params():
    return changed(init=lambda key: {})


def single_batches():
    return changed(sample=lambda key, shape, split="train": jnp.zeros(3))


def no_splits():
    return changed(sample=lambda key, shape: jnp.zeros((*shape, 3)))


def raising_sample():
    def sample(key, shape, split="train"):
        raise OSError("no such shard")

    return changed(sample=sample)


def loss_no_function():
    return changed(loss=3.0)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are given."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "own_tasks.py").write_text(TASKS)
    (folder / "broken.py").write_text("def make(:\n")
    (folder / "raising.py").write_text("raise RuntimeError('at import')\n")
    (folder / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    (folder / "a_file").write_text("x")
    (folder / "an_empty_folder").mkdir()
    (folder / "evaluation.json").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{")
    return folder


def train(*words):
    return ["train", "--steps", "1", *words]


def task(name):
    return train("--task", f"own_tasks:{name}")


COMMANDS = {
    "nothing": ([], "give a command: train, specialise, evaluate"),
    "an empty word": ([""], "unknown command ''; known: train"),
    "an unknown command": (["tune"], "unknown command 'tune'"),
    "an unknown option": (train("--stepz", "3"), "--stepz"),
    "an option without a value": (["train", "--steps"], "steps"),
    "a word too many": (train("more"), "more"),
    "steps: a word": (["train", "--steps", "many"], "many"),
    "steps: a fraction": (["train", "--steps", "2.5"], "2.5"),
    "steps: 0": (["train", "--steps", "0"], "TrainJob.steps must be at least 1, got 0"),
    "steps: -1": (["train", "--steps=-1"], "TrainJob.steps must be at least 1, got -1"),
    "minutes: nan": (train("--minutes", "nan"), "TrainJob.minutes must be a finite number"),
    "minutes: inf": (train("--minutes", "inf"), "TrainJob.minutes must be a finite number"),
    "seed: -1": (train("--seed=-1"), "TrainJob.seed must be in"),
    "seed: 10^30": (train("--seed", "1" + "0" * 30), "TrainJob.seed must be in"),
    "learned: unknown": (train("learned:adam"), "learned:adam; available .* learned:l3rs"),
    "learned: twice": (train("learned:lstm", "learned:velo"), "learned:velo; available .* method"),
    "base: unknown": (train("--learned.base", "sgdd"), "unknown base 'sgdd'"),
    "base: none": (train("--learned.base", ""), "base must be a sequence of at least one"),
    "base: of an LSTM": (
        train("learned:lstm", "--learned.base", "sgd"),
        "--learned.base .*perhaps you meant --learned.base of learned:l3rs",
    ),
    "variant: unknown": (train("--learned.variant", "both"), "both"),
    "ema: unknown": (train("--learned.ema", "two"), "--learned.ema.*three"),
    "hidden: a word": (train("--learned.hidden", "8,x"), "--learned.hidden: invalid literal"),
    "bank: 0": (train("learned:velo", "--learned.bank", "0"), "VeLO.bank must be at least 1"),
    "p: negative": (train("learned:lstm", "--learned.p", "-1"), "LSTM.p must be positive"),
    "population: odd": (train("--method.population", "3"), "population must be even"),
    "sigma: nan": (train("--method.sigma", "nan"), "NESConfig.sigma must be a finite number"),
    "strategy: unknown": (train("--method.strategy", "CMA"), "unknown NESConfig.strategy 'CMA'"),
    "truncation: 0": (
        train("method:tbptt", "--method.truncation", "0"),
        "TBPTTConfig.truncation must be at least 1",
    ),
    "a flag of another method": (
        train("method:nes", "--method.rollout", "20"),
        "--method.rollout .*perhaps you meant .*--method.rollout of method:pes",
    ),
    "task: unknown": (train("--task", "digitz"), "did you mean digits"),
    "task: empty": (train("--task", ""), "TrainJob.task must name at least one task"),
    "task: no module": (train("--task", "nowhere:make"), "No module named 'nowhere'"),
    "task: no function": (train("--task", "own_tasks:nowhere"), "nowhere"),
    "task: only a colon": (train("--task", ":"), "task ':'"),
    "task: a module without a name": (train("--task", ":make"), "task ':make'"),
    "task: a function without a name": (train("--task", "own_tasks:"), "task 'own_tasks:'"),
    "task: a path": (train("--task", "../own_tasks.py:make"), "own_tasks.py:make"),
    "task: a relative module": (train("--task", ".own_tasks:make"), "task '.own_tasks:make'"),
    "task: a module that cannot be parsed": (train("--task", "broken:make"), "broken.py"),
    "task: a module that raises": (train("--task", "raising:make"), "RuntimeError: at import"),
    "task: a module that exits": (train("--task", "leaving:make"), "leaving:make.*SystemExit"),
    "task: not a function": (task("NOT_A_FUNCTION"), "NOT_A_FUNCTION.*not callable"),
    "task: raises": (task("raises"), "own_tasks:raises.*RuntimeError: the user's own error"),
    "task: raises KeyError": (task("raises_key_error"), "own_tasks:raises_key_error.*KeyError"),
    "task: exits": (task("leaves"), "own_tasks:leaves.*SystemExit"),
    "task: wants an argument": (task("wants_an_argument"), "missing 1 required positional"),
    "task: returns None": (task("nothing"), "must return a metaopt.Task"),
    "task: returns a string": (train("--task", "os:getcwd"), "must return a metaopt.Task"),
    "task: loss [3]": (
        task("vector_loss"),
        r"loss_fn must return one real number, got float32\[3\]",
    ),
    "task: loss of integers": (task("integer_loss"), r"one real number, got int32\[\]"),
    "task: loss None": (task("no_loss"), "one real number, got a NoneType"),
    "task: loss NaN": (task("nan_loss"), "nan_loss.*loss before the first step is nan"),
    "task: loss raises": (task("raising_loss"), "task.*loss.*TypeError"),
    "task: loss of one argument": (task("loss_of_one_argument"), "task.*loss.*positional arg"),
    "task: loss no function": (task("loss_no_function"), "task.*loss must be a function"),
    "task: params of integers": (task("integer_params"), "task.*params.*int32"),
    "task: no params": (task("no_params"), "task.*init.*no params"),
    "task: init raises": (
        task("raising_init"),
        "init: the user's own error .own_tasks.py, line",
    ),
    "task: batches without their axes": (task("single_batches"), r"task.*sample.*leading axes"),
    "task: sample without splits": (task("no_splits"), "task.*sample.*split"),
    "task: sample raises": (task("raising_sample"), "task.*sample.*OSError: no such shard"),
    "warm_start: nothing there": (train("--warm-start", "nowhere"), "nowhere: there is no such"),
    "warm_start: a file": (train("--warm-start", "a_file"), "a_file: there is no such folder"),
    "warm_start: an empty folder": (
        train("--warm-start", "an_empty_folder"),
        "an_empty_folder/spec.json: cannot be read",
    ),
    "out: a file": (train("--task", "quadratic", "--out", "a_file"), "a_file"),
    "out: below a file": (train("--task", "quadratic", "--out", "a_file/x"), "a_file"),
    "out: a run with a broken config": (
        train("--task", "quadratic", "--learned.variant", "none", "--out", "run"),
        "run/config.json: not readable as JSON",
    ),
    "coordinator: no port": (
        train("--coordinator", "host", "--num-processes", "2", "--process-id", "0"),
        "coordinator must be host:port",
    ),
    "coordinator: alone": (train("--coordinator", "host:1"), "go together"),
    "process_id: beyond": (
        train("--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"),
        "process_id must be 0 to 1",
    ),
    "num_processes: alone": (train("--num-processes", "2"), "go together"),
    "evaluate: nothing there": (["evaluate", "nowhere"], "nowhere: there is no such folder"),
    "evaluate: an empty folder": (["evaluate", "an_empty_folder"], "spec.json: cannot be read"),
    "evaluate: one name twice": (
        ["evaluate", "an_empty_folder", "an_empty_folder"],
        "spec.json: cannot be read|different folder names",
    ),
    "evaluate: an unknown suite": (["evaluate", "--suite", "digit"], "did you mean digits"),
    "evaluate: an unknown baseline": (["evaluate", "--baselines", "sgdd"], "unknown baseline"),
    "evaluate: an unknown guard": (["evaluate", "--guards", "races"], "did you mean race"),
    "evaluate: an unknown fallback": (["evaluate", "--fallback", "x"], "fallback must be one of"),
    "evaluate: seeds 0": (["evaluate", "--seeds", "0"], "seeds must be at least 1"),
    "evaluate: window 7": (["evaluate", "--window", "7"], "not whole windows of 7"),
    "evaluate: num_steps 15": (["evaluate", "--num-steps", "15"], "not whole windows of 10"),
    "evaluate: workers 0": (["evaluate", "--workers", "0"], "workers must be at least 1"),
    "evaluate: out a file": (["evaluate", "--out", "a_file"], "a_file"),
    "evaluate: a foreign out": (["evaluate", "--out", "."], "evaluation.json: is not a plain file"),
    "report: nothing there": (["report", "nowhere"], "nowhere: holds no evaluation.json"),
    "report: no folder given": (["report"], "folder|FOLDER|required"),
    "report: a file": (["report", "a_file"], "a_file: holds no evaluation.json"),
    "report: a folder for a file": (["report", "."], "evaluation.json: is not a plain file"),
    "data: an unknown action": (["data", "fetch"], "fetch"),
    "data: show nothing": (["data", "show"], "unknown data set ''"),
    "data: show unknown": (["data", "show", "digit"], "did you mean digits"),
    "data: show a path": (["data", "show", "../../etc"], "unknown data set '../../etc'"),
    "data: prepare without a name": (["data", "prepare"], "give `metaopt data prepare NAME"),
    "data: prepare without a source": (["data", "prepare", "mnist"], "--from DIR"),
    "data: prepare from nowhere": (
        ["data", "prepare", "mnist", "--from", "nowhere"],
        "nowhere: no such folder",
    ),
    "data: prepare from a file": (
        ["data", "prepare", "mnist", "--from", "a_file"],
        "a_file: neither a folder nor a zip file",
    ),
    "data: prepare from nothing": (
        ["data", "prepare", "mnist", "--from", "an_empty_folder"],
        "holds nothing that mnist can be made of",
    ),
    "data: prepare an embedded set": (
        ["data", "prepare", "digits", "--from", "."],
        "'digits' is embedded",
    ),
    "data: prepare a name that climbs out": (
        ["data", "prepare", "../mine", "--from", "."],
        "use lower-case letters",
    ),
    "data: a picture in no folder": (
        ["data", "show", "moons", "--out", "nowhere/x.png"],
        "nowhere/x.png|no images",
    ),
    "bench: unknown": (["bench", "everything"], "everything"),
}


@bad_inputs(COMMANDS)
def test_a_command_that_cannot_work(folder, tmp_path, monkeypatch, capsys, bad, match):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("METAOPT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    out = [] if "--out" in bad or bad[:1] not in (["train"], ["evaluate"]) else ["--out"]
    arguments = [*bad, *out, *([str(tmp_path / "out")] if out else [])]
    before = fingerprint(folder)
    with within(60):
        assert main(arguments if bad else []) == 2
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith("metaopt: ") and len(line) < 1500
    assert re.search(match, line), line
    assert not said.out
    ours = lambda found: {k: v for k, v in found.items() if not re.search("__pycache__|lock", k)}
    assert ours(fingerprint(folder)) == ours(before)
    assert not (tmp_path / "out" / "export").exists()


def test_the_tasks_above_differ_from_a_good_one(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    from metaopt.tasks import catalog

    (folder / "good_task.py").write_text("from own_tasks import GOOD\ndef make():\n  return GOOD\n")
    with contextlib.ExitStack() as stack:
        stack.callback(os.chdir, Path.cwd())
        assert catalog.build("good_task:make").loss(1.0, 0.0) >= 0
