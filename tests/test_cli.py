"""The command line as people use it: train, evaluate, report; and one line for each mistake."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from metaopt import config, jobs, report
from metaopt.cli import main
from metaopt.config import EvaluateJob, SuiteTask

TRAIN = ["train", "--task", "moons", "--learned", "l3rs", "--steps", "2", "--nes.population", "2"]
TRAIN += ["--nes.tasks", "1", "--nes.min-steps", "4", "--nes.max-steps", "4"]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A trained optimizer, evaluated on a suite of two short real tasks."""
    folder = tmp_path_factory.mktemp("cli")
    suite = (SuiteTask("moons", "moons", 20), SuiteTask("no params of ours", "quadratic", 20))
    config.SUITES["tiny"] = suite
    assert main([*TRAIN, "--out", str(folder / "mine")]) == 0
    arguments = ["evaluate", str(folder / "mine"), "--suite", "tiny", "--seeds", "3"]
    arguments += ["--tuning-seeds", "1", "--guards", "race", "--out", str(folder / "records")]
    assert main(arguments) == 0
    yield folder, arguments
    del config.SUITES["tiny"]


def test_the_whole_way_from_training_to_report(evaluation, capsys):
    folder, _ = evaluation
    records = folder / "records"
    assert main(["report", str(records)]) == 0
    shown = capsys.readouterr().out
    assert "RACE(mine, SGD)" in shown and str(records) in shown.replace("\n", "")
    for name in ("comparison", "meta_training", "mixture-mine"):
        assert (records / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (records / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    summary = (records / "summary.md").read_text()
    assert "Adam tuned on the validation split over rates [0.001" in summary
    assert "Left out: mine: l3rs: theta was made for layers" in summary


def test_table_shows_what_the_records_hold(evaluation):
    folder, _ = evaluation
    task = folder / "records" / "0-moons-20"
    record = json.loads((task / jobs.RECORD).read_text())
    curves = jobs.read_curves(task / record["curves"]["SGD"])
    assert curves.loss.shape == (3, 3)
    assert (
        f"| SGD | {np.mean(curves.loss[:, -1]):.4f} ["
        in (folder / "records" / "summary.md").read_text()
    )


def test_the_reference_reaches_its_own_final_loss(evaluation):
    folder, _ = evaluation
    result = report.report(folder / "records")
    adam = next(row for row in result["rows"]["moons"] if row.optimizer == "Adam")
    assert adam.steps <= 20


def test_records_are_drawn_without_the_checkpoints_too(evaluation, tmp_path):
    folder, _ = evaluation
    shutil.copytree(folder / "records", tmp_path / "records")
    shutil.rmtree(tmp_path / "records" / "figures")
    os.rename(folder / "mine", folder / "away")
    result = report.report(tmp_path / "records")
    os.rename(folder / "away", folder / "mine")
    assert {path.stem for path in result["figures"]} == {"comparison"}


def test_what_is_recorded_is_not_run_again(evaluation, monkeypatch):
    _, arguments = evaluation
    monkeypatch.setattr(jobs, "evaluate", lambda *a, **k: pytest.fail("ran again"))
    monkeypatch.setattr(jobs, "tune", lambda *a, **k: pytest.fail("tuned again"))
    assert main(arguments) == 0


def test_records_of_another_evaluation_are_not_mixed(evaluation, capsys):
    _, arguments = evaluation
    changed = [a if a != "3" else "4" for a in arguments]
    assert main(changed) == 2
    assert "records of another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Expected one of {train, evaluate, report, data, bench}"),
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


def test_a_checkpoint_may_be_named_by_its_export_folder(tmp_path):
    assert jobs.folder_name(tmp_path / "mine" / "export") == "mine"
    assert EvaluateJob(checkpoints=(tmp_path / "mine",)).guards == "lgl2o,race"
