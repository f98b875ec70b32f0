"""Meta-training jobs: mixtures of tasks by name, horizons, and what identifies a run."""

import dataclasses
import json
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaopt
from metaopt.jobs import train as train_job
from metaopt.jobs.train import TrainJob, meta_train
from metaopt.meta import METHODS, NESConfig, PESConfig, TBPTTConfig
from metaopt.meta.loop import WARM_START, read_metrics, training_curves
from metaopt.optimizers import L3RS, LSTM, OPTIMIZERS, VeLO

SMALL = {"learned": L3RS(base=("sgd",)), "steps": 1, "validate_every": 1}

SHORT = NESConfig(population=2, tasks=1, min_steps=20, max_steps=20)


def test_a_job_knows_its_tasks_and_horizon_and_its_method():
    windows = {"rollout": 40, "truncation": 10}
    log_uniform = {**windows, "lengths": "log_uniform", "min_rollout": 20}
    nes = TrainJob(task="digits, spirals", method=NESConfig(min_steps=3, max_steps=7))
    pes = TrainJob(method=PESConfig(**log_uniform))
    tbptt = TrainJob(method=TBPTTConfig(**windows))
    assert nes.tasks == ["digits", "spirals"]
    assert [job.method.horizon for job in (nes, pes, tbptt)] == [(3, 7), (20, 40), (40, 40)]
    for job in (nes, pes, tbptt):
        fields = {field.name for field in dataclasses.fields(job.method)}
        assert job.identity["method"].keys() == {"name"} | fields
        assert METHODS[job.identity["method"]["name"]] is type(job.method)
    with pytest.raises(ValueError, match="at least one task"):
        TrainJob(task=" , ")


def test_what_is_kept_may_be_judged_on_the_whole_run(tmp_path):
    def validation_loss(on):
        job = TrainJob(
            task="digits-linear", out=tmp_path / on, validate_on=on, method=SHORT, **SMALL
        )
        meta_train(job)
        return read_metrics(tmp_path / on)["validation_loss"]

    final, trajectory = map(validation_loss, ("final", "trajectory"))
    assert (final < trajectory).all()  # the loss falls


def test_a_mixture_of_networks_is_trained_by_one_theta(tmp_path):
    settings = NESConfig(population=2, tasks=1, min_steps=2, max_steps=2, objective="normalised")
    task = "quadratic,digits-linear"
    job = TrainJob(task=task, method=settings, out=tmp_path, **{**SMALL, "learned": LSTM(p=7.0)})
    loaded = metaopt.load(meta_train(job))
    assert loaded.settings == LSTM(p=7.0)
    assert loaded.trained["learned"] == {"name": "lstm", **dataclasses.asdict(LSTM(p=7.0))}
    assert loaded.trained["task"] == task
    assert loaded.trained["num_steps"] == [2, 2]
    metrics = read_metrics(tmp_path)
    assert metrics["inner_steps"] == 2 * 2 * 2
    # In units of the loss at the start: two steps of an untrained optimizer change little.
    np.testing.assert_allclose(metrics["validation_loss"], 1.0, atol=0.1)
    assert json.loads((tmp_path / "config.json").read_text())["task"] == task


def test_a_network_with_batch_norm_is_trained_on(tmp_path):
    job = TrainJob(task="digits-resnet-batchnorm", out=tmp_path, method=SHORT, **SMALL)
    metaopt.load(meta_train(job))
    assert np.isfinite(read_metrics(tmp_path)["validation_loss"]).all()


def test_embeddings_of_one_network_are_refused_for_another(tmp_path):
    job = TrainJob(task="digits-linear,moons", out=tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"task group 2 of 2.*Dense_1.*variant"):
        meta_train(job)


def test_the_tables_are_the_unions_of_a_job():
    assert list(OPTIMIZERS) == ["l3rs", "lstm", "velo", "celo", "celo_adam", "celo2", "adafac_mlp"]
    assert [OPTIMIZERS[name] for name in ("l3rs", "lstm", "velo")] == [L3RS, LSTM, VeLO]
    assert all(settings.name == name for name, settings in OPTIMIZERS.items())
    assert METHODS == {"nes": NESConfig, "pes": PESConfig, "tbptt": TBPTTConfig}
    hints = get_type_hints(TrainJob)
    assert get_args(hints["learned"]) == tuple(OPTIMIZERS.values())
    assert get_args(hints["method"]) == tuple(METHODS.values())


def test_a_resumed_run_names_the_setting_that_changed(tmp_path):
    method = NESConfig(population=2, tasks=1, min_steps=2, max_steps=2)
    job = TrainJob(task="digits-linear", method=method, out=tmp_path, **SMALL)
    meta_train(job)
    other = dataclasses.replace(method, sigma=0.2)
    with pytest.raises(ValueError, match=r"\(method\.sigma: 0\.05 -> 0\.2\)"):
        meta_train(dataclasses.replace(job, method=other))
    with pytest.raises(ValueError, match=r"\(learned\.name: 'l3rs' -> 'lstm'\)"):
        meta_train(dataclasses.replace(job, learned=LSTM()))


def test_a_warm_start_must_have_the_same_settings(tmp_path):
    theta = LSTM(hidden=2).build().init(jax.random.key(0), {})
    metaopt.save(tmp_path / "first", LSTM(hidden=2), theta)
    job = TrainJob(learned=LSTM(hidden=3), warm_start=str(tmp_path / "first"), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds LSTM\(hidden=2.*but this run.*LSTM\(hidden=3"):
        meta_train(job)


@pytest.mark.parametrize(
    "change, loss, said",
    [
        (0.0, np.inf, "that it began with: no loss on held-out runs was finite"),
        (0.0, 1.5, "that it began with: no update was better on held-out runs"),
        (0.1, 1.5, ""),
    ],
)
def test_whatever_a_run_ends_with_is_exported_and_said(
    tmp_path, monkeypatch, capsys, change, loss, said
):
    """By itself: metrics may be gone, and are not asked."""
    changed = lambda trainer, theta, **settings: (jax.tree.map(lambda x: x + change, theta), loss)
    monkeypatch.setattr(train_job, "train", changed)
    job = TrainJob(task="quadratic", learned=LSTM(hidden=2), method=SHORT, out=tmp_path)
    train_job.run(job)
    trained = metaopt.load(tmp_path).trained
    assert trained["improved"] == bool(change)
    assert trained["validation_loss"] == (loss if np.isfinite(loss) else None)
    shown = capsys.readouterr()
    assert shown.out.strip().endswith(f"the theta {said}" if said else "export")
    assert shown.err.strip().endswith(
        f"metaopt evaluate {tmp_path} --task quadratic --num-steps 20"
    )


def test_a_theta_that_is_not_finite_is_not_exported(tmp_path, monkeypatch):
    nan = lambda trainer, theta, **settings: (jax.tree.map(lambda x: x * jnp.nan, theta), 1.0)
    monkeypatch.setattr(train_job, "train", nan)
    job = TrainJob(task="quadratic", learned=LSTM(hidden=2), method=SHORT, out=tmp_path)
    with pytest.raises(ValueError, match=r"load would refuse this export: .*holds NaN"):
        meta_train(job)


def test_the_metrics_of_a_warm_start_are_kept_with_the_run(tmp_path, monkeypatch):
    theta = LSTM(hidden=2).build().init(jax.random.key(0), {})
    metaopt.save(tmp_path / "first" / "export", LSTM(hidden=2), theta)
    (tmp_path / "first" / "metrics.jsonl").write_text('{"step": 0, "meta_loss": 42.0}\n')
    monkeypatch.setattr(train_job, "train", lambda trainer, theta, **settings: (theta, 1.0))
    for start in (tmp_path / "first", tmp_path / "first" / "export"):
        out = tmp_path / f"from-{start.name}"
        settings = {"learned": LSTM(hidden=2), "method": SHORT, "task": "quadratic"}
        meta_train(TrainJob(**settings, warm_start=str(start), out=out))
        assert training_curves(out, WARM_START) == {"step": [0.0], "meta_loss": [42.0]}


@pytest.mark.parametrize("steps", [[], [1], [0, 2], [0, 1]])
def test_a_cost_is_told_only_if_no_line_of_the_metrics_is_missing(tmp_path, monkeypatch, steps):
    line = '{{"step": {}, "inner_steps": 40, "seconds": 0.5}}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(line.format(step) for step in steps))
    monkeypatch.setattr(train_job, "train", lambda trainer, theta, **settings: (theta, 1.0))
    job = TrainJob(task="quadratic", learned=LSTM(hidden=2), method=SHORT, out=tmp_path)
    cost = metaopt.load(meta_train(job)).cost
    assert cost == ({"inner_steps": 80.0, "seconds": 1.0} if steps == [0, 1] else None)


def test_more_steps_than_can_be_counted_are_refused():
    TrainJob(steps=2**31 - 1)
    with pytest.raises(ValueError, match=r"TrainJob\.steps must be .*2147483647.*got 2147483648"):
        TrainJob(steps=2**31)
