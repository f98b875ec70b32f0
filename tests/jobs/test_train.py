"""Meta-training jobs: mixtures of tasks by name, horizons, and what identifies a run."""

import json

import numpy as np
import pytest

import metaopt
from metaopt.jobs import meta_train
from metaopt.jobs.settings import TrainJob
from metaopt.meta import NESConfig, PESConfig, TBPTTConfig
from metaopt.meta.loop import read_metrics

SMALL = {"learned": "l3rs", "base": "sgd", "steps": 1, "validate_every": 1}

SHORT = NESConfig(population=2, tasks=1, min_steps=20, max_steps=20)


def test_a_job_knows_its_tasks_and_horizon_and_only_its_own_method():
    windows = {"rollout": 40, "truncation": 10}
    log_uniform = {**windows, "lengths": "log_uniform", "min_rollout": 20}
    nes = TrainJob(task="digits, spirals", nes=NESConfig(min_steps=3, max_steps=7))
    pes = TrainJob(method="pes", pes=PESConfig(**log_uniform))
    tbptt = TrainJob(method="tbptt", tbptt=TBPTTConfig(**windows))
    assert nes.tasks == ["digits", "spirals"]
    assert [job.horizon for job in (nes, pes, tbptt)] == [(3, 7), (20, 40), (40, 40)]
    for job, own in ((nes, "nes"), (pes, "pes"), (tbptt, "tbptt")):
        assert {"nes", "pes", "tbptt"} & job.identity.keys() == {own}
    with pytest.raises(ValueError, match="at least one task"):
        TrainJob(task=" , ")


def test_what_is_kept_may_be_judged_on_the_whole_run(tmp_path):
    def validation_loss(on):
        job = TrainJob(task="digits-linear", out=tmp_path / on, validate_on=on, nes=SHORT, **SMALL)
        meta_train(job)
        return read_metrics(tmp_path / on)["validation_loss"]

    final, trajectory = map(validation_loss, ("final", "trajectory"))
    assert (final < trajectory).all()  # the loss falls


def test_a_mixture_of_networks_is_trained_by_one_theta(tmp_path):
    settings = NESConfig(population=2, tasks=1, min_steps=2, max_steps=2, objective="normalised")
    task = "quadratic,digits-linear"
    job = TrainJob(task=task, nes=settings, out=tmp_path, **{**SMALL, "learned": "lstm", "p": 7.0})
    loaded = metaopt.load(meta_train(job))
    assert loaded.config == {"p": 7.0}
    assert loaded.trained["task"] == task
    assert loaded.trained["num_steps"] == [2, 2]
    metrics = read_metrics(tmp_path)
    assert metrics["inner_steps"] == 2 * 2 * 2
    # In units of the loss at the start: two steps of an untrained optimizer change little.
    np.testing.assert_allclose(metrics["validation_loss"], 1.0, atol=0.1)
    assert json.loads((tmp_path / "config.json").read_text())["task"] == task


def test_embeddings_of_one_network_are_refused_for_another(tmp_path):
    job = TrainJob(task="digits-linear,moons", out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"task group 2 of 2.*Dense_1.*variant"):
        meta_train(job)
