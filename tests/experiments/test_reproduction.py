"""The runner of the papers' figures: it compares, resumes, and writes what reports read."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import metaopt
from experiments.checks import graded
from experiments.figure_records import FigureRecords
from experiments.reproduction import TRAININGS, Figure, Reproduction, main
from metaopt import optimizers
from metaopt.core.files import only_writer
from metaopt.evaluation.records import read_curves, read_record
from metaopt.jobs.train import TrainJob
from metaopt.meta import NESConfig
from metaopt.meta.loop import read_metrics
from metaopt.report import report


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """One small figure with an untrained LSTM."""
    folder = tmp_path_factory.mktemp("reproduction")
    settings = optimizers.LSTM(hidden=2)
    theta = settings.build().init(jax.random.key(0), {"w": np.zeros(3)})
    export = str(metaopt.save(folder / "export", settings, theta))

    def figures(full):
        return [
            Figure(
                name="fig1",
                title="a figure",
                task="quadratic",
                num_steps=40 if full else 20,
                measure_every=2,
                learned={"L2O": export},
                guards=("lgl2o",),
                fallbacks=("sgd",),
                baselines=("sgd",),
                window=5,
            )
        ]

    return Reproduction(
        title="a paper", figures=figures, seeds=2, seeds_full=3, out=folder / "records"
    )


def test_runs_once_and_is_read_by_reports(paper):
    main(paper, "experiments.paper", ["--workers", "1"])
    record = read_record(paper.out / "fig1")
    names = ["SGD", "L2O", "LGL2O(L2O, SGD)"]
    assert list(record.curves) == names and not record.left_out
    before = {path: path.stat().st_mtime_ns for path in (paper.out / "fig1").iterdir()}
    main(paper, "experiments.paper", ["--workers", "1"])
    assert before == {path: path.stat().st_mtime_ns for path in (paper.out / "fig1").iterdir()}
    assert "a figure" in report(paper.out)["summary"].read_text()

    figure = FigureRecords(paper.out / "fig1")
    curves = read_curves(paper.out / "fig1" / record.curves["L2O"].file)
    assert curves.loss.shape == (2, 3)  # two seeds; the start and two measurements
    assert figure.loss("L2O", 10) == pytest.approx(curves.loss[:, 1].mean())
    assert figure.loss("L2O") == pytest.approx(curves.loss[:, 1:].mean())
    won = read_curves(paper.out / "fig1" / record.curves[names[2]].file).state["accepted"]
    assert figure.share_won(names[2], 0, 0.5) == won[:, :2].mean()


def test_a_folder_in_which_another_process_writes_is_refused(paper, capsys):
    paper.out.mkdir(exist_ok=True)
    with only_writer(paper.out), pytest.raises(SystemExit):
        main(paper, "experiments.paper", ["--workers", "1"])
    assert "another process is writing in this folder" in capsys.readouterr().err


def test_unknown_figures_are_named(paper, capsys):
    with pytest.raises(SystemExit):
        main(paper, "experiments.paper", ["--only", "fig2"])
    assert "no figures ['fig2']; there are ['fig1']" in capsys.readouterr().err


def test_meta_trainings_are_run_once_and_drawn(paper, tmp_path):
    job = TrainJob(
        task="quadratic",
        learned=optimizers.LSTM(),
        method=NESConfig(population=2, tasks=1, min_steps=2, max_steps=2),
        steps=2,
        validate_every=1,
        out=tmp_path / "run",
    )
    trained = dataclasses.replace(paper, trainings=lambda full: {"L2O, seed 0": job})
    main(trained, "experiments.paper", ["--workers", "1", "--only", TRAININGS])
    ((update, loss),) = FigureRecords(paper.out).held_out_losses("L2O")
    np.testing.assert_array_equal(update, [0, 1])
    np.testing.assert_array_equal(loss, read_metrics(job.out)["validation_loss"])
    shutil.rmtree(job.out)  # what is recorded is not run again
    main(trained, "experiments.paper", ["--workers", "1"])
    assert not job.out.exists() and len(FigureRecords(paper.out).held_out_losses("L2O")) == 1
    assert "meta_training.png" in {path.name for path in report(paper.out)["figures"]}


def test_grades():
    assert graded([True, True]) == "reproduced"
    assert graded([True, False]) == "partly"
    assert graded([False]) == "not"
