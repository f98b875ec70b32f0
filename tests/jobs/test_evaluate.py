"""Evaluations: what is recorded, resumed, refused, left out."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from refusals import fingerprint

from metaopt import optimizers, report
from metaopt.cli import main
from metaopt.core.files import only_writer
from metaopt.evaluation import baselines, comparing, suites, tuning
from metaopt.evaluation.contenders import GUARDS, adversary, folder_name, guarded
from metaopt.evaluation.curves import evaluate
from metaopt.evaluation.records import read_curves, read_grid, read_index, read_record
from metaopt.evaluation.suites import SUITES, Suite, SuiteTask
from metaopt.jobs import evaluate as evaluate_job
from metaopt.jobs.evaluate import EvaluateJob, suite_tasks
from metaopt.tasks import catalog, quadratic
from metaopt.tasks.catalog import TASKS, build
from metaopt.zoo import exports

TASKS_RUN = (
    SuiteTask("moons", "moons", 20),
    SuiteTask("no params of ours", "quadratic", 20),
    SuiteTask("data that is not here", "cifar10-cnn3", 20),
)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """An L3RS made for moons, evaluated on a suite of short tasks."""
    folder = tmp_path_factory.mktemp("evaluation")
    SUITES["tiny"] = Suite("for tests", TASKS_RUN)
    settings = optimizers.L3RS()
    params = build("moons").init(jax.random.key(0))
    theta = settings.build().init(jax.random.key(0), params)
    exports.save(folder / "mine", settings, theta)
    arguments = ["evaluate", str(folder / "mine"), "--suite", "tiny", "--seeds", "3"]
    arguments += ["--tuning-seeds", "1", "--guards", "race", "--out", str(folder / "records")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAOPT_DATA_DIR", str(folder / "no-data"))
        assert main(arguments) == 0
        yield folder, arguments
    del SUITES["tiny"]


def test_every_contender_has_its_curves(evaluation):
    records = evaluation[0] / "records"
    assert read_index(records)["tasks"] == ["00-moons-20", "01-quadratic-20", "02-cifar10-cnn3-20"]
    record = read_record(records / "00-moons-20")
    assert list(record.curves) == ["SGD", "Adam", "mine", "RACE(mine, SGD)"]
    assert [c.kind for c in record.curves.values()] == ["baseline"] * 2 + ["learned", "guarded"]
    assert record.curves["RACE(mine, SGD)"][2:5] == ("mine", "race", "SGD")
    curves = {n: read_curves(records / "00-moons-20" / c.file) for n, c in record.curves.items()}
    for curve in curves.values():  # the same starts for all
        np.testing.assert_allclose(curve.loss[:, 0], curves["SGD"].loss[:, 0], rtol=1e-6)
    assert curves["mine"].state["alpha"].shape == (3, 2, 4, 2)  # seeds, windows, layers, bases
    layers = ("Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel")
    assert record.curves["mine"].layers == layers
    assert record.curves["mine"].bases == ("sgd", "adam")
    np.testing.assert_array_equal(curves["RACE(mine, SGD)"].grad_evals, [0, 20, 40])


def test_a_baseline_s_curve_is_that_of_its_tuned_transformation(evaluation):
    folder = evaluation[0] / "records" / "00-moons-20"
    record = read_record(folder)
    tuned = record.tuned["SGD"]
    grid = read_grid(folder / tuned["file"])
    final = grid.loss[:, :, -1].mean(axis=1)
    assert tuned["point"] == tuned["grid"][int(np.argmin(final))]
    schedule = {
        "constant": lambda lr: lr,
        "cosine": lambda lr: optax.cosine_decay_schedule(lr, 20),
    }[tuned["point"]["schedule"]]
    expected = evaluate(
        lambda n: optax.sgd(schedule(tuned["point"]["lr"])),
        build("moons"),
        num_steps=20,
        keys=jax.random.split(jax.random.split(jax.random.key(2**31 - 1))[0], 3),
    )
    curves = read_curves(folder / record.curves["SGD"].file)
    np.testing.assert_allclose(curves.loss, expected.loss, rtol=1e-4)


def test_what_cannot_be_run_is_named_with_what_to_do(evaluation):
    records = evaluation[0] / "records"
    left_out = read_record(records / "01-quadratic-20").left_out
    assert "l3rs: theta was made for layers" in left_out["mine"]
    missing = read_record(records / "02-cifar10-cnn3-20")
    assert not missing.curves
    said = "cifar10 not prepared; give metaopt data prepare cifar10"
    assert said in missing.left_out["all"]
    assert said in (records / "summary.md").read_text()


def test_what_is_recorded_is_not_run_again(evaluation, monkeypatch):
    folder, arguments = evaluation
    lost = folder / "records" / "00-moons-20"
    record = json.loads((lost / "record.json").read_text())
    del record["curves"]["SGD"]
    (lost / "record.json").write_text(json.dumps(record))
    ran = []
    monkeypatch.setattr(
        comparing, "evaluate", lambda make, *a, **k: ran.append(1) or evaluate(make, *a, **k)
    )
    monkeypatch.setattr(tuning, "run", lambda *a, **k: pytest.fail("tuned again"))
    assert main(arguments) == 0
    assert len(ran) == 1
    assert "SGD" in read_record(lost).curves


def test_what_was_run_where_the_data_were_stays_recorded_where_they_are_not(
    evaluation, monkeypatch
):
    folder, arguments = evaluation
    before = read_record(folder / "records" / "00-moons-20")
    monkeypatch.setattr(comparing.catalog, "missing_data", lambda task: ["moons"])
    assert main(arguments) == 0
    assert read_record(folder / "records" / "00-moons-20") == before


def test_records_of_another_evaluation_are_not_mixed(evaluation, capsys):
    _, arguments = evaluation
    changed = [a if a != "3" else "4" for a in arguments]
    assert main(changed) == 2
    assert "records of another evaluation" in capsys.readouterr().err


def test_a_tuned_point_that_is_not_in_the_grid_is_not_used(evaluation, tmp_path, capsys):
    folder, arguments = evaluation
    out = shutil.copytree(folder / "records", tmp_path / "records")
    path = out / "00-moons-20" / "record.json"
    record = json.loads(path.read_text())
    record["tuned"]["SGD"]["point"]["lr"] = 999.0
    path.write_text(json.dumps(record))
    assert main([*arguments[:-1], str(out)]) == 2
    assert "'lr': 999.0} of SGD is not in its grid" in capsys.readouterr().err


OWN = """
import flax.linen as nn
import optax
from metaopt import datasets, tasks
from metaopt.evaluation.baselines import Baseline, points

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        return nn.Dense(2)(nn.Dropout(0.1, deterministic=not train)(x))

number = 3
batchnorm = lambda: tasks.classification(Net(), datasets.moons(), batch_size=8)

def lost_statistics():
    task = batchnorm()
    return task.replace(loss=lambda *arguments: task.loss_fn(*arguments)[0])

make_task = lambda: tasks.quadratic(dim=4)
mlp = lambda: tasks.classification(tasks.networks.MLP((4, 2)), datasets.moons(), batch_size=8)
momentum = lambda schedule: optax.sgd(schedule, momentum=0.9)
adam = Baseline("My Adam", optax.adam, points(("constant",), lr=(0.1,)))
groups = Baseline("Groups", optax.adamw, points(("constant",), lr=(0.01, 0.1)), draws=3)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of a user's: a task, baselines, and what is neither."""
    (tmp_path / "own_job.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("METAOPT_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("own_job", None)


def test_tasks_and_baselines_of_one_s_own(own_module):
    out = own_module / "records"
    command = (
        "evaluate --task own_job:make_task --num-steps 20 --seeds 2 --tuning-seeds 1 --guards="
    )
    command += " --fallback own_job:adam --baselines own_job:adam,own_job:momentum --out"
    assert main([*command.split(), str(out)]) == 0
    folder = out / "00-own_job-make_task-20"
    record = read_record(folder)
    assert list(record.curves) == ["My Adam", "momentum"]
    assert record.tuned["My Adam"]["grid"] == [{"schedule": "constant", "lr": 0.1}]
    point = record.tuned["momentum"]["point"]
    schedules = {"constant": optax.constant_schedule, "cosine": optimizers.cosine_decay}
    arguments = (point["lr"],) if point["schedule"] == "constant" else (point["lr"], 20)
    tx = optax.sgd(schedules[point["schedule"]](*arguments), momentum=0.9)
    k_eval, _ = jax.random.split(jax.random.key(2**31 - 1))
    expected = evaluate(
        lambda num_steps: tx, quadratic(dim=4), num_steps=20, keys=jax.random.split(k_eval, 2)
    )
    found = read_curves(folder / record.curves["momentum"].file)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
    environment = read_index(out)["environment"]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        models = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        assert not models or f"x {models[0]} (cpu)" in environment["device"]
    recorded = environment["command"]
    assert "--task own_job:make_task" in recorded and "--guards ''" in recorded
    assert "Task `own_job:make_task`, 2 seeds." in (out / "summary.md").read_text()
    assert "task own_job:make_task" in (out / "report.html").read_text()


def test_tasks_with_running_statistics_in_several_processes(own_module):
    """Also under guards."""
    settings = optimizers.L3RS(variant="none")
    params = {"w": np.zeros((2, 4), np.float32)}
    theta = settings.build().init(jax.random.key(0), params)
    exports.save(own_module / "mine", settings, theta)
    out = own_module / "records"
    tasks = "own_job:batchnorm,own_job:make_task"
    command = f"evaluate {own_module / 'mine'} --task {tasks} --num-steps 20 --seeds 2 --workers 2"
    command += " --tuning-seeds 1 --guards race,lgl2o,smg --fallback own_job:adam"
    assert main([*command.split(), "--baselines", "own_job:adam", "--out", str(out)]) == 0
    for task in ("00-own_job-batchnorm-20", "01-own_job-make_task-20"):
        record = read_record(out / task)
        names = ["My Adam", "mine", "RACE(mine, My Adam)", "LGL2O(mine, My Adam)"]
        assert list(record.curves) == [*names, "SMG(mine)"]
        for entry in record.curves.values():
            assert np.isfinite(read_curves(out / task / entry.file).loss).all()


def test_a_guard_around_rates_per_group_and_a_resume_with_them(own_module, monkeypatch, capsys):
    monkeypatch.setattr(report, "report", lambda folder: None)
    monkeypatch.setattr(report, "print_summary", lambda drawn: None)
    settings = optimizers.LSTM(hidden=2, layers=1, scale=1e4)
    theta = settings.build().init(jax.random.key(0), {})
    exports.save(own_module / "mine", settings, theta)
    out = own_module / "records"
    command = f"evaluate {own_module / 'mine'} --task own_job:mlp --num-steps 20 --seeds 2"
    command += " --tuning-seeds 1 --guards race --fallback own_job:groups --baselines "
    command = [*command.split(), "own_job:groups", "--out", str(out)]
    assert main(command) == 0
    folder = out / "00-own_job-mlp-20"
    record = read_record(folder)
    loss = {n: read_curves(folder / entry.file).loss for n, entry in record.curves.items()}
    np.testing.assert_allclose(loss["RACE(mine, Groups)"], loss["Groups"], rtol=1e-4)
    point = record.tuned["Groups"]["grid"][-1]
    assert point["lr"].keys() == {"Dense_0", "Dense_1"}
    (folder / "record.json").write_text(json.dumps(edited_point(folder, point)))
    assert main(command) == 0
    point["lr"]["Dense_0"] *= 1.01
    (folder / "record.json").write_text(json.dumps(edited_point(folder, point)))
    assert main(command) == 2
    assert "of Groups is not in its grid" in capsys.readouterr().err


def edited_point(folder, point):
    record = json.loads((folder / "record.json").read_text())
    record["tuned"]["Groups"]["point"] = point
    return record


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--task own_job:nothing", "package.module:function"),
        ("--task own_job:lost_statistics", "the loss must return (loss, new_model_state)"),
        ("--task moons --suite small", "give a suite or a task"),
        ("--task moons --baselines adam,own_job:number", "must be a Baseline or a function"),
        ("--task moons --baselines adam,no_module_of_mine:make", "No module named"),
        ("--task moons --baselines adam,adam", "must have different names"),
        ("--task noons", "moons"),
    ],
)
def test_what_is_no_task_or_baseline_is_named(own_module, capsys, arguments, message):
    assert main(["evaluate", *arguments.split(), "--out", str(own_module / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (own_module / "out").exists()


def test_a_folder_has_one_evaluation_at_a_time(evaluation, capsys):
    folder, arguments = evaluation
    index = (folder / "records" / "evaluation.json").read_bytes()
    with only_writer(folder / "records"):
        for more in ([], ["--overwrite", "True"]):
            assert main([*arguments, *more]) == 2
            assert "another process is writing in this folder" in capsys.readouterr().err
    assert (folder / "records" / "evaluation.json").read_bytes() == index


def test_only_an_evaluation_is_overwritten(evaluation, tmp_path, monkeypatch, capsys):
    folder, arguments = evaluation
    monkeypatch.setattr(evaluate_job, "in_processes", lambda *arguments: None)
    monkeypatch.setattr(report, "report", lambda folder: None)
    monkeypatch.setattr(report, "print_summary", lambda drawn: None)
    out = shutil.copytree(folder / "records", tmp_path / "records")
    arguments = [*arguments[:-1], str(out), "--overwrite", "True"]
    for foreign in ("thesis.tex", "figures/mine.svg", "00-moons-20/notes.txt"):
        (out / foreign).write_text("years")
        before = fingerprint(out)
        assert main(arguments) == 2
        assert f"holds '{foreign}', which metaopt did not write" in capsys.readouterr().err
        assert fingerprint(out) == before
        (out / foreign).unlink()
    assert main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "lock"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.md").write_text("years")  # a name of ours, but no evaluation
    assert main([*arguments[:-3], str(tmp_path / "mine"), "--overwrite", "True"]) == 2
    assert (tmp_path / "mine" / "summary.md").read_text() == "years"


@pytest.mark.parametrize("start", ["secret", 5, ["secret"], {"a": 1}])
def test_no_name_in_an_export_leads_to_another_file(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text('{"step": 0, "meta_loss": 42.0}\n')
    settings = optimizers.LSTM(hidden=2)
    theta = settings.build().init(jax.random.key(0), {})
    exports.save(tmp_path / "run" / "export", settings, theta, {"warm_start": start})
    job = EvaluateJob(checkpoints=(tmp_path / "run",))
    curves = lambda: evaluate_job._meta_training(job, evaluate_job.load_all(job))
    assert curves() == {}
    for name in ("metrics.jsonl", "warm-start.jsonl"):
        shutil.copy(tmp_path / "secret" / "metrics.jsonl", tmp_path / "run" / name)
    assert curves().keys() == {"run", "run: warm start"}


def test_the_report_is_drawn_without_the_checkpoints_too(evaluation, tmp_path):
    shutil.copytree(evaluation[0] / "records", tmp_path / "records")
    assert main(["report", str(tmp_path / "records")]) == 0
    assert "RACE(mine, SGD)" in (tmp_path / "records" / "report.html").read_text()


@pytest.mark.parametrize("guard", GUARDS)
def test_every_guard_can_be_compared(guard):
    if guard in ("smg", "amg"):
        learned = adversary("ascent")._replace(
            optimizer=optimizers.lstm(hidden=2, layers=1),
        )
        params = build("moons").init(jax.random.key(0))
        theta = learned.optimizer.init(jax.random.key(0), params)
        learned = learned._replace(theta=theta, name="LSTM")
    else:
        learned = adversary("ascent")
    contender = guarded(learned, guard, "SGD", lambda n: optax.sgd(0.1), 5)
    fallback = "" if guard in ("smg", "amg") else ", SGD"
    assert contender.name == f"{guard.upper()}({learned.name}{fallback})"
    curves = evaluate(
        contender.make,
        build("moons"),
        num_steps=20,
        keys=jax.random.split(jax.random.key(0), 2),
        window=5,
        diagnostics=contender.fields,
        held_out=contender.held_out,
    )
    assert curves.state["accepted"].shape == (2, 4)
    assert contender.held_out == ("loss_evals" in curves.state) == (guard == "race-held-out")
    assert curves.grad_evals[-1] > 10 and np.isfinite(curves.loss).all()


@pytest.mark.parametrize("name", [name for name in optimizers.ADVERSARIES if name != "late"])
def test_a_guarded_adversary_is_its_fallback(name):
    task, keys = build("moons"), jax.random.split(jax.random.key(0), 2)
    run = lambda make, **settings: evaluate(make, task, num_steps=20, keys=keys, **settings)
    sgd = lambda n: optax.sgd(0.3)
    expected = run(sgd)
    contender = guarded(adversary(name), "race", "SGD", sgd, 10)
    found = run(contender.make, diagnostics=("accepted",))
    lost = ~found.state["accepted"].any(axis=1)
    np.testing.assert_allclose(found.loss[lost], expected.loss[lost], rtol=1e-5)
    assert lost.any()


def test_folders_give_names(tmp_path):
    assert folder_name(tmp_path / "mine" / "export") == "mine"
    assert folder_name(tmp_path / "mine") == "mine"


def test_suites_name_tasks_baselines_and_guards_that_there_are():
    for suite in suites.SUITES.values():
        for task in suite.tasks:
            assert task.task in TASKS
            assert task.num_steps % (10 * task.measure_every) == 0
        assert set(suite.guards.split(",")) <= set(GUARDS)
        assert set(suite.baselines.split(",")) <= set(baselines.BASELINES)
        assert suite.fallback in suite.baselines.split(",")
        assert set(suite.adversaries) <= set(optimizers.ADVERSARIES)
    assert len(suites.SUITES["small"].tasks) == 12


def test_the_quick_form_of_the_general_suite_trains_every_kind_of_network(tmp_path):
    words = "evaluate celo-adam --suite general-quick --num-steps 20 --seeds 1 --guards="
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    folders = sorted(tmp_path.glob("[0-9]*"))
    assert len(folders) == len(suites.SUITES["general-quick"].tasks)
    for folder in folders:
        record = read_record(folder)
        assert list(record.curves) == ["Adam", "celo-adam"] and not record.left_out
        for curve in record.curves.values():
            assert np.isfinite(read_curves(folder / curve.file).loss).all()


def test_a_stand_in_takes_the_place_of_a_task_without_its_data(monkeypatch):
    job = EvaluateJob(suite="general")
    numbers = [i for i, task in enumerate(suites.SUITES["general"].tasks) if task.stand_in]

    def with_prepared(*names):
        monkeypatch.setattr(catalog.datasets, "state", lambda name: names.count(name) or unprepared)
        return [suite_tasks(job)[i] for i in numbers]

    unprepared, own = "not prepared", ["cifar10-cnn", "cifar10-resnet", "cifar10-cnn"]
    assert [t.task for t in with_prepared("cifar10")] == own
    assert [t.task for t in with_prepared()] == own
    stand_ins = with_prepared("mnist")
    assert [task.task for task in stand_ins] == ["mnist-cnn", "mnist-resnet", "mnist-cnn"]
    assert stand_ins[0].title == (
        "CNN on CIFAR-10 (200 steps); mnist-cnn in its place: cifar10 not prepared"
    )


def test_published_curves_are_compared_with(tmp_path, monkeypatch):
    from metaopt.evaluation.records import Curves, TaskRecord

    monkeypatch.setenv("METAOPT_DATA_DIR", str(tmp_path))
    steps, loss = np.arange(0.0, 1000.0, 100.0), np.geomspace(2.0, 0.2, 10)
    file = tmp_path / "velodrome" / "speedup_over_multiple_baselines.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"reference": [steps.tolist(), loss.tolist()]}))
    own = np.array([[2.0, loss[6]]] * 3)  # after 100 steps, where the reference is after 600
    nothing = np.zeros(2)
    curves = Curves(*(np.array([0, 100]), nothing, nothing, own, own, own, nothing, {}))
    record = TaskRecord("t", "t", 100, 10, {}, {}, {}, {})
    comparing._compare_with_velodrome(record, "reference", "mine", curves)
    np.testing.assert_allclose(record.velodrome["speedup"]["mine"], 6.0, rtol=1e-6)


def test_steps_that_are_not_whole_windows_are_refused_before_anything_runs(tmp_path, capsys):
    assert main(["evaluate", "--suite", "digits", "--num-steps", "4", "--out", str(tmp_path)]) == 2
    assert "4 steps are not whole windows of 10" in (said := capsys.readouterr().err)
    assert "--num-steps 10." in said
    with pytest.raises(ValueError, match=r"25 steps .* --num-steps 20 or 30"):
        EvaluateJob(suite="digits", num_steps=25)
    with pytest.raises(ValueError, match=r"MLP on digits: 100 steps .* windows of 7"):
        EvaluateJob(suite="small", window=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "num_steps, window, often", [(100, 10, 5), (70, 10, 1), (60, 10, 3), (40, 20, 2), (1000, 10, 5)]
)
def test_a_suite_is_measured_as_seldom_as_its_windows_allow(num_steps, window, often):
    """Of 5 windows between two measurements, what divides the number of windows."""
    job = EvaluateJob(suite="velodrome", num_steps=num_steps, window=window)
    tasks = suite_tasks(job)
    assert [(t.num_steps, t.measure_every) for t in tasks] == [(num_steps, often)] * 2
