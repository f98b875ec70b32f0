"""The command line as people use it: train, evaluate, report; and one line for each mistake."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from metaopt.cli import main, parse
from metaopt.core import memory
from metaopt.jobs import report as report_job
from metaopt.jobs.train import TrainJob
from metaopt.meta import PESConfig
from metaopt.meta.loop import Terminated
from metaopt.optimizers import L3RS, LSTM

TRAIN = ["train", "--task", "moons", "--steps", "2", "learned:l3rs", "method:nes"]
TRAIN += ["--method.population", "2", "--method.tasks", "1"]
TRAIN += ["--method.min-steps", "4", "--method.max-steps", "4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a command: train, specialise, evaluate, report, data, zoo, bench"),
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["train", "--stepz", "4"], "--stepz, 4; perhaps you meant --steps"),
        (["train", "--steps", "many"], "invalid literal for int"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "learned:sgd"], "learned:sgd; available subcommands: learned:l3rs, learned:ls"),
        (["train", "--method.population", "3"], "population must be even (antithetic pairs)"),
        (["train", "--nes.population", "4"], "you meant --method.population of method:nes"),
        (["train", "method:pes", "--method.rollout", "7"], "multiple of truncation"),
        (["train", "--learned.base", "adam,adamm"], "unknown base 'adamm'"),
        (["train", "--task", "digitz"], "did you mean digits"),
        (["train", "--task", "nowhere:task"], "No module named 'nowhere'"),
        (["train", "--task", "json:dumpz"], "dumpz"),
        (["train", "--task", "builtins:dict"], "must return a metaopt.Task"),
        (["train", "--warm-start", "/nothing/here"], "no such folder"),
        (["evaluate", "/nothing/here"], "no such folder"),
        (["evaluate", "--suite", "digit"], "did you mean digits"),
        (["evaluate", "--baselines", "sgd,adamm"], "unknown baseline 'adamm'"),
        (["evaluate", "--guards", "rase"], "did you mean race"),
        (["evaluate", "--fallback", "lion"], "fallback must be one of the baselines"),
        (["evaluate", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["report", "/nothing/here"], "holds no evaluation.json"),
        (["data", "show", "digit"], "did you mean digits"),
        (["data", "show"], "unknown data set ''"),
        (["bench", "everything"], "everything"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("metaopt: ")
    assert message in errors[0]


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for command in ("train", "specialise", "evaluate", "report", "data", "zoo", "bench"):
        assert command in shown


def test_help_of_train_lists_the_rows_of_both_tables(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in ("learned:l3rs", "learned:lstm", "learned:velo", "learned:celo2"):
        assert f"• {name} " in shown
    for name in ("method:nes", "method:pes", "method:tbptt"):
        assert f"• {name} " in shown


@pytest.mark.parametrize(
    "words",
    [
        "--task moons learned:lstm --learned.p 7 method:pes --method.population 4",
        "method:pes learned:lstm --learned.p 7 --task moons --method.population 4",
        "learned:lstm --task moons method:pes --method.population 4 --learned.p 7.0",
    ],
)
def test_subcommands_and_flags_come_in_any_order(words):
    job = parse(TrainJob, words.split(), "metaopt train")
    expected = TrainJob(task="moons", learned=LSTM(p=7.0), method=PESConfig(population=4))
    assert job == expected


def test_lists_of_settings_are_separated_by_commas():
    words = ["--learned.base", "sgd, lion", "--learned.hidden", "8", "--learned.ema", "0.5,0.9"]
    job = parse(TrainJob, words, "metaopt train")
    assert job.learned == L3RS(base=("sgd", "lion"), hidden=(8,), ema=(0.5, 0.9))


def test_commands_that_need_no_jax_do_not_import_it(tmp_path):
    code = "import sys; from metaopt.cli import main\n"
    for arguments in (["report", "nowhere"], ["zoo", "list"], ["bench", "everything"]):
        code += f"main({arguments})\nif 'jax' in sys.modules: sys.exit({arguments[0]!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_benchmarks_outside_of_a_clone(tmp_path, monkeypatch, capsys):
    """As a user of the wheel has it: `benchmarks` cannot be imported."""
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.setitem(sys.modules, "benchmarks.__main__", None)
    assert main(["bench", "step"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "python -m benchmarks step" in line


def test_data_list_and_show(capsys):
    assert main(["data", "list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["data", "show", "digits"]) == 0
    assert "1257" in capsys.readouterr().out


def test_a_users_own_task_is_trained_on(tmp_path, monkeypatch):
    (tmp_path / "my_job.py").write_text(
        "from metaopt.tasks import quadratic\ndef make_task():\n    return quadratic(dim=3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [*TRAIN, "--out", str(tmp_path / "run")]
    arguments[2] = "my_job:make_task"
    assert main(arguments) == 0
    del sys.modules["my_job"]
    assert (tmp_path / "run" / "export" / "spec.json").exists()


@pytest.mark.parametrize("lr, kept", [("0.01", False), ("1e9", True)])
def test_training_says_when_no_update_helped(tmp_path, capsys, lr, kept):
    main([*TRAIN, "--seed", "1", "--method.lr", lr, "--out", str(tmp_path / "run")])
    assert ("export, the theta that it began with" in capsys.readouterr().out) == kept


@pytest.mark.parametrize("status", [0, None, 3, "a text"])
def test_a_command_that_is_ended_by_sys_exit_says_so(monkeypatch, capsys, status):
    """A loss of the user's may call it; the command must not look as if it had succeeded."""
    monkeypatch.setattr(report_job, "run", lambda job: sys.exit(status))
    assert main(["report", "somewhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"sys.exit({status!r})" in line


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (TRAIN, "a meta-update"),
        (
            ["evaluate", "--task", "quadratic", "--num-steps", "10", "--baselines", "adam"],
            "a measurement on the valid split of all seeds",
        ),
    ],
    ids=["train", "evaluate"],
)
def test_too_little_memory_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, command, what
):
    monkeypatch.setattr(memory, "available", lambda device: 10)
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"metaopt: {what} needs about")
    assert "Traceback" not in "".join(progress)


def test_a_run_that_was_terminated_keeps_its_status(monkeypatch):
    def terminated(job):
        raise Terminated(Path("run"), 3)

    monkeypatch.setattr(report_job, "run", terminated)
    with pytest.raises(SystemExit) as stop:
        main(["report", "somewhere"])
    assert stop.value.code == 143


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_locale_without_unicode_is_no_error(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    assert main(["report", "\u2022\u03b8"]) == 2
    out.flush(), err.flush()
    assert b"usage: metaopt report" in out.buffer.getvalue()
    assert err.buffer.getvalue().startswith(b"metaopt: ")


@pytest.mark.parametrize("command", ["zoo list", "zoo show celo", "report --help"])
def test_a_reader_of_the_output_may_leave(command):
    """As in ``metaopt zoo list | head -1``."""
    with subprocess.Popen(
        [sys.executable, "-m", "metaopt", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
