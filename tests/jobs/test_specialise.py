"""`metaopt specialise`: its parts are runs and evaluations like any other, and it resumes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import metaopt
from metaopt.evaluation.records import read_index
from metaopt.jobs.specialise import SpecialiseJob, choose, search_and_train, specialise
from metaopt.meta.loop import read_metrics
from metaopt.optimizers import L3RS
from metaopt.tasks import catalog
from metaopt.zoo import exports

JOB = SpecialiseJob(
    task="digits-linear", num_steps=10, minutes=0.02, points=12, baselines="adam", seeds=2
)

BASES = ("sgd", "adam", "lion")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = dataclasses.replace(JOB, out=tmp_path_factory.mktemp("specialise") / "out")
    with open(job.out.parent / "said", "w") as file:
        specialise(job, Console(file=file, width=200))
    return job


def test_says_what_it_does(job):
    said = (job.out.parent / "said").read_text()
    assert "650 numbers in 2 leaves" in said
    assert "L3RS of sgd, adam, lion; it tells the leaves apart" in said
    assert "12 points; then 0.02 minutes of NES, 16 candidates x 4 runs of 10 steps" in said
    assert "search: " in said and "learning rate" in said


def test_costs_are_those_of_the_search_and_of_all_meta_updates(job):
    searched, trained = exports.load(job.start), exports.load(job.out / "L3RS")
    assert searched.trained["cost"]["inner_steps"] == 13 * 8 * 10  # points, with theta itself
    steps = read_metrics(job.out / "L3RS")["inner_steps"].sum()
    assert trained.trained["cost"]["inner_steps"] == 13 * 8 * 10 + steps
    assert read_index(job.out / "evaluation")["training_cost"] == {
        "searched": searched.trained["cost"],
        "L3RS": trained.trained["cost"],
    }


def test_meta_training_begins_where_the_search_ended(job):
    config = json.loads((job.out / "L3RS" / "config.json").read_text())
    assert config["warm_start"] == str(job.start)
    searched, trained = exports.load(job.start), exports.load(job.out / "L3RS")
    same = jax.tree.map(np.array_equal, searched.theta, trained.theta)
    assert all(jax.tree.leaves(same)) != trained.trained["improved"]


def test_given_again_it_changes_nothing(job):
    times = {path: path.stat().st_mtime_ns for path in job.out.rglob("*.npz")}
    theta = exports.load(job.out / "L3RS").sha256
    specialise(job, Console(quiet=True))
    assert times == {path: path.stat().st_mtime_ns for path in job.out.rglob("*.npz")}
    assert theta == exports.load(job.out / "L3RS").sha256


def test_a_search_alone_does_not_replace_a_meta_training(job):
    with pytest.raises(ValueError, match=r"with meta-training .*choose another folder"):
        search_and_train(dataclasses.replace(job, minutes=0.0), Console(quiet=True))


def test_another_job_in_its_folder_is_refused(job):
    with pytest.raises(ValueError, match="holds the search of another job"):
        specialise(dataclasses.replace(job, points=13), Console(quiet=True))


def negative_task():
    """Its loss has no logarithm."""
    return metaopt.Task(
        init=lambda key: {"w": jax.random.normal(key, (2, 3)), "b": jax.random.normal(key, (3,))},
        loss=lambda params, batch: batch * optax.tree.norm(params, squared=True) - 100.0,
        sample=lambda key, shape, split="train": jax.random.uniform(key, shape),
        whole=lambda split="test": jnp.ones([]),
    )


def test_runs_that_differ_in_length_and_networks_of_any_kind(tmp_path):
    """The rate falls with the horizon; all lengths judge; the record says what was found."""
    job = dataclasses.replace(
        JOB, task="digits-linear,digits", min_steps=4, num_steps=16, points=24, bases="adam"
    )
    job = dataclasses.replace(job, any_network=True, minutes=0.0, out=tmp_path)
    with open(tmp_path / "said", "w") as file:
        assert search_and_train(job, Console(file=file, width=400)) == job.start
    searched = exports.load(job.start)
    assert searched.trained["cost"]["inner_steps"] == 25 * 2 * 4 * (4 + 8 + 16)
    point = searched.trained["search"]["point"]
    assert set(point) >= {"base", "lr", "horizon_power"} and np.isfinite(point["horizon_power"])
    assert f"horizon_power {point['horizon_power']:.2g}" in (tmp_path / "said").read_text()
    method = job.training(searched.settings).method
    assert method.lengths == "log_uniform"
    assert job.training(L3RS()).validation_lengths == (4, 8, 16)
    assert "NES" not in (tmp_path / "said").read_text()
    assert job.evaluation().checkpoints == (job.start,)
    with pytest.raises(ValueError, match="the search of another job"):
        search_and_train(dataclasses.replace(job, min_steps=5), Console(quiet=True))
    with pytest.raises(ValueError, match=r"without meta-training .*choose another folder"):
        search_and_train(dataclasses.replace(job, minutes=0.01), Console(quiet=True))


def test_a_loss_without_a_logarithm_is_refused(tmp_path):
    job = dataclasses.replace(JOB, task=f"{__name__}:negative_task", out=tmp_path)
    with pytest.raises(ValueError, match="none of 7 optimizers had a finite score"):
        specialise(job, Console(quiet=True))
    assert not (tmp_path / "searched").exists()


def test_layers_are_told_apart_where_all_tasks_have_the_same():
    families = {name: catalog.family(name) for name in ("digits", "digits-linear", "spirals")}
    assert choose([families["digits"], families["spirals"]], BASES).variant == "embedding"
    assert choose([families["digits"], families["digits-linear"]], BASES).variant == "none"
    assert choose([families["digits"]], ("muon",), any_network=True).variant == "none"
    assert choose([families["digits"]], ("muon",)).base == ("muon",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"minutes": -1.0}, "minutes must not be negative"),
        ({"baselines": "adma"}, "adma"),
        ({"task": " "}, "task must name at least one"),
        ({"baselines": ""}, "baselines must name at least one"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(JOB, **changes)


@pytest.mark.parametrize(
    ("num_steps", "window"), [(1, 1), (7, 1), (50, 5), (57, 3), (59, 1), (100, 10), (1000, 10)]
)
def test_windows_of_the_evaluation_divide_the_run(num_steps, window):
    job = dataclasses.replace(JOB, num_steps=num_steps)
    assert job.window == job.evaluation().window == window
