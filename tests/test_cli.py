"""The command line as people use it: train, evaluate, report; and one line for each mistake."""

import sys

import pytest

from metaopt.cli import main

TRAIN = ["train", "--task", "moons", "--learned", "l3rs", "--steps", "2", "--nes.population", "2"]
TRAIN += ["--nes.tasks", "1", "--nes.min-steps", "4", "--nes.max-steps", "4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Expected one of {train, evaluate, report, data, zoo, bench}"),
        (["trian"], "trian"),
        (["train", "--stepz", "4"], "--stepz"),
        (["train", "--steps", "many"], "invalid literal for int"),
        (["train", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "--learned", "sgd"], "sgd"),
        (["train", "--nes.population", "3"], "population must be even (antithetic pairs), got 3"),
        (["train", "--tbptt.rollout", "7"], "multiple of truncation"),
        (["train", "--base", "adam,adamm"], "unknown base 'adamm'"),
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
    for command in ("train", "evaluate", "report", "data", "bench"):
        assert command in shown


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
    main([*TRAIN, "--seed", "1", "--nes.lr", lr, "--out", str(tmp_path / "run")])
    assert ("export, the theta that it began with" in capsys.readouterr().out) == kept
